"""Proof that raw bytes are those of a chunk, or of some of its blocks: at once, or piece by piece."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.fingerprint import MODULUS, fingerprint, fingerprint_run, start_of_run
from checkpoint.format.layout import Box


@dataclass(frozen=True, slots=True)
class Expected:
    """What a box of a tensor holds: its fingerprint, and its checksum, unless it is a part of a chunk."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    fingerprint: int
    checksum: bytes | None

    @property
    def first(self) -> int | None:
        """At which byte of the tensor the box begins, if its elements lie there side by side."""
        return start_of_run(self.dtype, self.shape, self.box)

    def prove(self, raw: Buffer) -> None:
        """Raise Corrupt if these are not the raw bytes of the box.

        The fingerprint tells that, made anew of every byte; the checksum, what is wrong.
        """
        found = fingerprint(raw, self.dtype, self.shape, self.box)
        if found != self.fingerprint and self.checksum is not None:
            self.compare_checksums(checksum(raw))
        self.compare_fingerprints(found)

    def prove_decoded(self, raw: Buffer) -> None:
        """Do the same with what a codec or a delta made: damage to what is stored may change much of it."""
        if self.checksum is not None:
            self.compare_checksums(checksum(raw))
        self.compare_fingerprints(fingerprint(raw, self.dtype, self.shape, self.box))

    def prove_whole(self, memory: memoryview) -> Iterator[memoryview]:
        """Yield memory for all of it, in one piece; raise Corrupt if it is filled with something else."""
        yield memory
        self.prove(memory)

    def prove_coming(self, pieces: Iterable[memoryview], first: int) -> Iterator[memoryview]:
        """Yield pieces of memory, in order, which the receiver fills one by one; raise Corrupt at the end.

        Each is looked at as soon as it was filled, while it is in the processor's cache. `first` is as above.
        """
        total = 0
        for piece in pieces:
            yield piece
            total += fingerprint_run(piece, first)
            first += piece.nbytes
        self.compare_fingerprints(total % MODULUS)

    def compare_checksums(self, found: bytes) -> None:
        """Raise Corrupt if the checksum is another."""
        if found != self.checksum:
            raise Corrupt("it is not what was written: its checksum does not match")

    def compare_fingerprints(self, found: int) -> None:
        """Raise Corrupt if the fingerprint is another."""
        if found == self.fingerprint:
            return
        if self.checksum is None:
            raise Corrupt("it is not what was written: the fingerprint of its blocks does not match")
        raise Corrupt("it belongs elsewhere: its fingerprint does not match")


def cut_pieces(stretches: Iterable[memoryview], first: int, piece_bytes: int) -> Iterator[memoryview]:
    """Cut memory that takes the bytes of a tensor from `first` on, also at each multiple of `piece_bytes`."""
    for memory in stretches:
        at = 0
        while at < memory.nbytes:
            length = min(piece_bytes - first % piece_bytes, memory.nbytes - at)
            yield memory[at : at + length]
            at, first = at + length, first + length
