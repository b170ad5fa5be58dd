"""The arena: preallocated shared memory that holds a host's snapshots until their bytes are packed."""

import ctypes
import errno
import mmap
import os
from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoint.errors import ArenaFull

ALIGNMENT = 64  # a cache line, and no less than any element's size
MIB = 1 << 20
_PIECE_BYTES = 1 * MIB
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def aligned(num_bytes: int) -> int:
    """Round up to the alignment of chunks."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A part of the arena, lent to one snapshot share until it is released."""

    offset: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """First byte after the region."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Sizing:
    """Whether an arena may grow, and what those who chose its size call that: errors speak of it."""

    growth: Literal["fixed", "as needed"] = "fixed"
    setting: str = "`checkpoint.arena_mib`"


_AS_IT_IS = Sizing()


class Arena:
    """A number of bytes, lent out first-fit. It may grow, in place, and never shrinks.

    The memory is an anonymous file (memfd): it is shared with other processes by passing `fd` over a socket,
    needs no room in /dev/shm, and is gone with the last process that maps it. The first touch of a page costs
    ten times the copy: `touch` does that, piece by piece, for what is not lent yet. Not thread-safe: its
    owner holds a lock around `reserve`, `release` and `touch`.
    """

    def __init__(self, num_bytes: int, sizing: Sizing = _AS_IT_IS) -> None:
        if num_bytes < ALIGNMENT:
            raise ArenaFull(f"an arena of {num_bytes} bytes holds nothing: raise {sizing.setting}")
        self.num_bytes = 0
        self.sizing = sizing
        self._num_touched = 0
        self._lent: list[Region] = []
        self.fd = os.memfd_create("holdfast-arena", os.MFD_CLOEXEC)
        try:
            self.grow(num_bytes)
        except ArenaFull:
            os.close(self.fd)
            raise

    def grow(self, num_bytes: int) -> None:
        """Become as large as that, if it is not; whoever views the memory goes on viewing the same bytes.

        Raises `ArenaFull` if the machine has not so much.
        """
        if num_bytes <= self.num_bytes:
            return
        try:
            if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                raise OSError(errno.ENOMEM, "it has less memory")
            os.ftruncate(self.fd, num_bytes)
            self._memory = map_arena(self.fd, num_bytes)
        except OSError as error:
            raise ArenaFull(
                f"this machine cannot give an arena of {_mib(num_bytes)} MiB ({error.strerror}): "
                f"lower {self.sizing.setting}, or save a smaller state"
            ) from error
        self.num_bytes = num_bytes

    def reserve(self, num_bytes: int) -> Region | None:
        """Lend the first gap that is large enough; None while there is none.

        Raises `ArenaFull` when even the empty arena could not hold so much.
        """
        wanted = aligned(max(num_bytes, 1))
        if wanted > self.num_bytes:
            raise ArenaFull(
                f"one rank's share of the snapshot takes {_mib(wanted)} MiB and the arena of its host has "
                f"{_mib(self.num_bytes)} MiB: raise {self.sizing.setting} to at least {_mib(wanted)} "
                "(twice the host's share of the state lets the next capture start while this one is flushed)"
            )
        start = self._gap(wanted, self._lent)
        if start is None:
            return None
        granted = Region(start, wanted)
        insort(self._lent, granted)
        return granted

    def would_fit(self, num_bytes: int, released: Collection[Region]) -> bool:
        """Whether so much could be lent if some regions were released."""
        staying = [region for region in self._lent if region not in released]
        return self._gap(aligned(max(num_bytes, 1)), staying) is not None

    def release(self, region: Region) -> None:
        """Take a region back."""
        self._lent.remove(region)

    def touch(self) -> bool:
        """Give the next piece its pages, unless it is lent; return whether there is more to do."""
        piece = Region(self._num_touched, min(_PIECE_BYTES, self.num_bytes - self._num_touched))
        if all(region.stop <= piece.offset or region.offset >= piece.stop for region in self._lent):
            os.pwrite(self.fd, bytes(piece.num_bytes), piece.offset)
            populate(self._memory, piece)
        self._num_touched = piece.stop
        return piece.stop < self.num_bytes

    def view(self, region: Region) -> memoryview:
        """Return a region's bytes, writable."""
        return memoryview(self._memory)[region.offset : region.stop]

    def _gap(self, wanted: int, lent: Sequence[Region]) -> int | None:
        """Return where the first gap is that is large enough."""
        start = 0
        for region in lent:
            if region.offset - start >= wanted:
                break
            start = region.stop
        return start if start + wanted <= self.num_bytes else None

    @property
    def memory(self) -> memoryview:
        """All of it, as it is now."""
        return memoryview(self._memory)

    @property
    def num_lent_bytes(self) -> int:
        """Bytes lent out now."""
        return sum(region.num_bytes for region in self._lent)

    def close(self) -> None:
        """Give the file back; the memory goes when nobody views it any longer."""
        os.close(self.fd)


def map_arena(fd: int, num_bytes: int) -> mmap.mmap:
    """Map an arena's file into this process."""
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED)


def populate(memory: mmap.mmap, piece: Region) -> bool:
    """Map a piece's pages now, not one by one as they are first used; False if the kernel cannot (< 5.14).

    Lets other threads go on meanwhile, and changes nothing of what is there.
    """
    first = ctypes.c_char.from_buffer(memory, piece.offset)
    return not _libc.madvise(ctypes.addressof(first), piece.num_bytes, _POPULATE_WRITE)


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // MIB)
