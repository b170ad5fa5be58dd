"""Fingerprints of a foreign checkpoint, taken of what is read of it for something else, in the same pass.

They are of the foreign tensors as their reader returns them, share by share as the reference's account places
them: neither the plan that is followed nor what puts global tensors together has a part in it.
"""

import threading
from collections.abc import Collection, Sequence

from checkpoint.engine.regions import Regions, find_uncovered, padded
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.format.fingerprint import MODULUS
from checkpoint.interop.account import Account, Share
from checkpoint.interop.conversion.casting import Reach
from checkpoint.interop.conversion.contract import Array, ConversionSettings
from checkpoint.interop.conversion.padding import look_at_padding
from checkpoint.interop.conversion.proving import changed, held_twice, marked, prove
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.moves import Foreign


class Marked:
    """A foreign checkpoint that remembers the fingerprint of every share that was read. Thread-safe."""

    def __init__(self, foreign: Contents, account: Account) -> None:
        self.about = foreign.about
        self.tensors: Sequence[Foreign] = foreign.tensors
        self._foreign = Counted(foreign)
        self._account = account
        self._shares: dict[int, list[Share]] = {}
        unmarked = changed(account, foreign) | held_twice(account)
        for share in account.shares:
            if share.name not in unmarked:
                self._shares.setdefault(share.source, []).append(share)
        self._marks: dict[tuple[str, Box], int] = {}

    @property
    def num_read_bytes(self) -> int:
        """How many bytes of tensors were read so far, for whatever reason."""
        return self._foreign.num_bytes

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box. Raises Mismatch if they are others than they were before."""
        bits = self._foreign.read(number, box)
        for share in self._shares.get(number, ()):
            part = share.box.intersect(box)
            if part is not None:
                self._mark(share, part, bits[part.within(box)])
        return bits

    @property
    def changed(self) -> frozenset[str]:
        """The names of the tensors whose values rules cast or average."""
        return frozenset(changed(self._account, self._foreign))

    def fingerprints(
        self, names: Collection[str], settings: ConversionSettings, reach: Reach
    ) -> dict[str, int]:
        """Return those of these global tensors; what was not read, or not whole, is read for it now.

        `reach` counts what is lost where rules change values. Raises Mismatch if copies of a tensor differ.
        """
        known = self._complete()
        rest = prove(self._account.only(set(names) - known.keys()), self._foreign, settings, reach)
        return rest | known

    def padding(self, settings: ConversionSettings) -> list[str]:
        """Tell of the padding of tensors, which is read for it."""
        return look_at_padding(self._account, self._foreign, settings)

    def _mark(self, share: Share, part: Box, bits: Array) -> None:
        mark = marked(share, bits, part, self._account.tensors[share.name])
        if self._marks.setdefault((share.name, share.place(part)), mark) != mark:
            raise Mismatch(f"{self.tensors[share.source]} changed while it was being read: is it in use?")

    def _complete(self) -> dict[str, int]:
        """Return the fingerprints of the tensors of which each element was read exactly once."""
        numbers = {name: number for number, name in enumerate(self._account.tensors)}
        shares: dict[int, list[Box]] = {}
        sums: dict[str, int] = {}
        for (name, place), mark in self._marks.items():
            shares.setdefault(numbers[name], []).append(place)
            sums[name] = (sums.get(name, 0) + mark) % MODULUS
        shapes = [spec.shape for spec in self._account.tensors.values()]
        while shares:
            owners = [target for target, places in shares.items() for _ in places]
            regions = Regions.of([place for places in shares.values() for place in places], owners)
            wide = padded(shapes, max(map(len, shapes)), 1)
            wrong = find_uncovered(regions, wide, list(shares))
            if wrong is None:
                break
            del shares[wrong]
        return {name: sums[name] for name, number in numbers.items() if number in shares}


class Counted:
    """A foreign checkpoint, and how many bytes were read of it."""

    def __init__(self, inner: Contents) -> None:
        self.about = inner.about
        self.tensors: Sequence[Foreign] = inner.tensors
        self.num_bytes = 0
        self._inner = inner
        self._lock = threading.Lock()

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box."""
        bits = self._inner.read(number, box)
        with self._lock:
            self.num_bytes += bits.nbytes
        return bits
