"""The arena: preallocated shared memory that holds a host's snapshots until their bytes are packed."""

import mmap
import os
from bisect import insort
from dataclasses import dataclass

from checkpoint.errors import ArenaFull

ALIGNMENT = 64  # a cache line, and no less than any element's size
MIB = 1 << 20


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


class Arena:
    """A fixed number of bytes, lent out first-fit; it never grows.

    The memory is an anonymous file (memfd): it is shared with other processes by passing `fd` over a socket,
    needs no room in /dev/shm, and is gone with the last process that maps it. Every page is touched once,
    here, because a first touch costs ten times the copy. Not thread-safe: its owner holds a lock around
    `reserve` and `release`.
    """

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < ALIGNMENT:
            raise ArenaFull(f"an arena of {num_bytes} bytes holds nothing: raise `checkpoint.arena_mib`")
        self.num_bytes = num_bytes
        self.fd = os.memfd_create("holdfast-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, num_bytes)
            self._memory = map_arena(self.fd, num_bytes)
        except OSError as error:
            os.close(self.fd)
            raise ArenaFull(
                f"this machine cannot give an arena of {_mib(num_bytes)} MiB ({error.strerror}): "
                "lower `checkpoint.arena_mib`"
            ) from error
        self._lent: list[Region] = []

    def reserve(self, num_bytes: int) -> Region | None:
        """Lend the first gap that is large enough; None while there is none.

        Raises `ArenaFull` when even the empty arena could not hold so much.
        """
        wanted = aligned(max(num_bytes, 1))
        if wanted > self.num_bytes:
            raise ArenaFull(
                f"one rank's share of the snapshot takes {_mib(wanted)} MiB and the arena of its host has "
                f"{_mib(self.num_bytes)} MiB: raise `checkpoint.arena_mib` to at least {_mib(wanted)} "
                "(twice the host's share of the state lets the next capture start while this one is flushed)"
            )
        start = 0
        for region in self._lent:
            if region.offset - start >= wanted:
                break
            start = region.stop
        if start + wanted > self.num_bytes:
            return None
        granted = Region(start, wanted)
        insort(self._lent, granted)
        return granted

    def release(self, region: Region) -> None:
        """Take a region back."""
        self._lent.remove(region)

    def view(self, region: Region) -> memoryview:
        """Return a region's bytes, writable."""
        return memoryview(self._memory)[region.offset : region.stop]

    @property
    def num_lent_bytes(self) -> int:
        """Bytes lent out now."""
        return sum(region.num_bytes for region in self._lent)

    def close(self) -> None:
        """Give the file back; the memory goes when nobody views it any longer."""
        os.close(self.fd)


def map_arena(fd: int, num_bytes: int) -> mmap.mmap:
    """Map an arena's file into this process, all of its pages at once."""
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _mib(num_bytes: int) -> int:
    return -(-num_bytes // MIB)
