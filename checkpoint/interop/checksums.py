"""CRC-32s that files tell of parts of themselves, held against what is read of these, in whatever order."""

import threading
import zlib
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its lowest power first, as are all here
_ONE, _X_TO_8 = 1 << 31, 1 << 23


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes of a file that a checksum covers, and that were not read."""

    path: str
    begin: int
    stop: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A part of a file whose bytes are not those that it had when it was written."""

    name: str
    told: int
    found: int


@dataclass(slots=True)
class _Part:
    """A part of a file, and the pieces of it that were seen: begin, end and checksum of each, in order."""

    name: str
    begin: int
    stop: int
    told: int
    pieces: list[tuple[int, int, int]] = field(default_factory=list)

    def unseen(self, begin: int, stop: int) -> list[tuple[int, int]]:
        """Return what of a range was not seen."""
        found, reached = [], max(begin, self.begin)
        stop = min(stop, self.stop)
        for first, last, _ in self.pieces:
            if reached < min(first, stop):
                found.append((reached, min(first, stop)))
            reached = max(reached, last)
        return [*found, (reached, stop)] if reached < stop else found

    def add(self, begin: int, stop: int, crc: int) -> None:
        """Add a piece, and join it to those that it touches."""
        insort(self.pieces, (begin, stop, crc))
        joined: list[tuple[int, int, int]] = []
        for first, last, own in self.pieces:
            if joined and joined[-1][1] == first:
                start, _, before = joined.pop()
                joined.append((start, last, combined(before, own, last - first)))
            else:
                joined.append((first, last, own))
        self.pieces = joined

    def damage(self) -> Damage | None:
        """Return what is wrong with it, once all of it was seen."""
        if [(first, last) for first, last, _ in self.pieces] != [(self.begin, self.stop)]:
            return None
        found = self.pieces[0][2]
        return None if found == self.told else Damage(self.name, self.told, found)


class Checksums:
    """What the files of a place tell of their parts, which do not overlap. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[str, dict[int, _Part]] = {}
        self._begins: dict[str, list[int]] = {}

    def expect(self, path: str, name: str, span: tuple[int, int], crc: int) -> None:
        """Take note that a part of a file, its first byte and so many of them, had this checksum."""
        begin, num_bytes = span
        with self._lock:
            parts = self._parts.setdefault(path, {})
            if begin not in parts and num_bytes:
                parts[begin] = _Part(name, begin, begin + num_bytes, crc)
                insort(self._begins.setdefault(path, []), begin)

    def saw(self, path: str, offset: int, data: memoryview) -> Damage | None:
        """Take note of bytes that were read. Returns a part that they complete and that is damaged."""
        with self._lock:
            parts = self._touched(path, offset, offset + len(data))
            unseen = [(part, span) for part in parts for span in part.unseen(offset, offset + len(data))]
        sums = [zlib.crc32(data[begin - offset : stop - offset]) for _, (begin, stop) in unseen]
        with self._lock:
            for (part, (begin, stop)), crc in zip(unseen, sums, strict=True):
                if part.unseen(begin, stop) == [(begin, stop)]:  # no other thread was faster
                    part.add(begin, stop, crc)
            return next(filter(None, (part.damage() for part, _ in unseen)), None)

    def gaps(self) -> list[Gap]:
        """Return what is missing of parts of which most was read, such as the padding at their end."""
        with self._lock:
            found = []
            for path, parts in self._parts.items():
                for part in parts.values():
                    unseen = part.unseen(part.begin, part.stop)
                    if 2 * sum(stop - begin for begin, stop in unseen) < part.stop - part.begin:
                        found += [Gap(path, begin, stop) for begin, stop in unseen]
            return found

    def _touched(self, path: str, begin: int, stop: int) -> list[_Part]:
        begins = self._begins.get(path, [])
        first = max(0, bisect_right(begins, begin) - 1)
        parts = [self._parts[path][start] for start in begins[first : bisect_right(begins, stop - 1)]]
        return [part for part in parts if part.stop > begin]


def combined(first: int, second: int, num_second: int) -> int:
    """Return the CRC-32 of two pieces in a row from those of each; the second has so many bytes.

    As zlib's crc32_combine (Mark Adler): appending a byte multiplies by x^8, modulo the polynomial.
    """
    return _times(_shift(num_second), first) ^ second


@lru_cache(maxsize=4096)
def _shift(num_bytes: int) -> int:
    """Return x^(8 * num_bytes) modulo the polynomial."""
    result, power = _ONE, _X_TO_8
    while num_bytes:
        if num_bytes & 1:
            result = _times(result, power)
        power = _times(power, power)
        num_bytes >>= 1
    return result


def _times(one: int, other: int) -> int:
    """Multiply two polynomials modulo the polynomial."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
