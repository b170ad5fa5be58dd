"""Memory for the page cache that is real: taken all of it, and given back just before as much is written.

A virtual machine gives what lies idle back to its host, and whoever touches it next waits for every page,
several times as long as for the disk. None of that is any engine's doing, and it strikes by chance: the
kernel hands out whichever free memory it finds first. So, as on a machine that has run for long, nearly all
of it is kept full, with holes of a file that were read: such pages cost no disk, and the kernel takes them
back when it must. What an engine will need is given up by that file at the moment when the engine begins.
"""

import os
import shutil
import uuid
from pathlib import Path

_PIECE_BYTES = 8 << 20
_SHORT_BYTES = 384 << 20  # free: the kernel keeps about as much for itself
_MAX_BYTES = 64 << 30  # of a machine's memory that are kept full, to bound the time that takes
_GENEROSITY = 2  # engines need memory besides what they write
_LEAST_BYTES = 64 << 20  # less is written by a test, which measures nothing


class Spares:
    """The memory that is kept full by one process, and a folder for what engines wrote when they are done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._full = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
        self._begin = self._end = 0  # of what is kept full, in that file
        folder.mkdir(exist_ok=True)

    def keep(self, path: Path) -> None:
        """Take over a file or a folder that nobody needs: its memory goes when it is full anyhow."""
        path.rename(self._folder / uuid.uuid4().hex)

    def free(self, num_bytes: int) -> None:
        """Free memory for so many bytes to be written, and see that hardly any other memory is free."""
        self._remove_kept()
        if num_bytes < _LEAST_BYTES:
            return
        wanted = _GENEROSITY * num_bytes
        descriptor = os.open(self._full, os.O_RDWR | os.O_CREAT)
        try:
            self._fill(descriptor, wanted)
            os.posix_fadvise(descriptor, self._begin, wanted, os.POSIX_FADV_DONTNEED)
            self._begin = min(self._begin + wanted, self._end)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Give all of it back; what a disk has to be told of freed blocks, it is told now."""
        self._remove_kept()
        self._full.unlink(missing_ok=True)
        self._begin = self._end = 0
        os.sync()

    def _fill(self, descriptor: int, least_bytes: int) -> None:
        """Read on for as much as is free, and until at least so much is kept full."""
        missing = max(_free_bytes() - _SHORT_BYTES, least_bytes - (self._end - self._begin))
        room = max(_MAX_BYTES - (self._end - self._begin), 0)
        end = self._end + max(min(missing, room), 0) // _PIECE_BYTES * _PIECE_BYTES
        os.ftruncate(descriptor, end)
        piece = bytearray(_PIECE_BYTES)
        for place in range(self._end, end, _PIECE_BYTES):
            os.preadv(descriptor, [piece], place)
        self._end = end

    def _remove_kept(self) -> None:
        for path in list(self._folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))
