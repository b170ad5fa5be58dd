"""Memory for the page cache that is real: files nobody needs, removed just before as much is written.

A virtual machine gives what lies idle back to its host, and whoever touches it next waits for every page,
several times as long as for the disk. None of that is any engine's doing. So what an engine wrote is not
removed when it has had its turn, but when the next one needs the memory. (To touch other memory before does
not help: the kernel does not hand it out first.)
"""

import os
import shutil
import uuid
from pathlib import Path

_BLOCK = bytes(4 << 20)


class Spares:
    """A folder of such files, which processes that take turns may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def keep(self, path: Path) -> None:
        """Take over a file or a folder."""
        path.rename(self._folder / uuid.uuid4().hex)

    def free(self, num_bytes: int) -> None:
        """Free as much memory, of files that there are or else of one that is written for it."""
        left = num_bytes
        for file in sorted(path for path in self._folder.rglob("*") if path.is_file()):
            if left <= 0:
                break
            left -= file.stat().st_size
            file.unlink()
        if left <= 0:
            return
        path = self._folder / uuid.uuid4().hex
        with open(path, "wb", buffering=0) as written:
            while left > 0:
                left -= written.write(_BLOCK)
        path.unlink()

    def clear(self) -> None:
        """Remove all of them; what a disk has to be told of freed blocks, it is told now."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        os.sync()
