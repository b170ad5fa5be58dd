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
        self._num_kept_bytes = 0  # of that file; the kernel may have taken the first of them
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
            self._num_kept_bytes = max(self._num_kept_bytes - wanted, 0)
            os.posix_fadvise(descriptor, self._num_kept_bytes, 0, os.POSIX_FADV_DONTNEED)  # to its end
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Remove what engines wrote; what a disk has to be told of freed blocks, it is told now.

        What is kept full stays so, until the folder above is removed.
        """
        self._remove_kept()
        os.sync()

    def _fill(self, descriptor: int, least_bytes: int) -> None:
        """Read on for as much as is free, and until at least so much is kept full."""
        kept_bytes = self._num_kept_bytes
        missing = min(_free_bytes() - _SHORT_BYTES, _MAX_BYTES - kept_bytes)
        if kept_bytes:  # what else became free since was in use just now
            missing = min(missing, 2 * least_bytes)
        full_bytes = kept_bytes + max(missing, least_bytes - kept_bytes, 0)
        os.ftruncate(descriptor, full_bytes)
        piece = bytearray(_PIECE_BYTES)
        for place in range(kept_bytes, full_bytes, _PIECE_BYTES):
            os.preadv(descriptor, [piece], place)
        self._num_kept_bytes = full_bytes

    def _remove_kept(self) -> None:
        for path in list(self._folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))
