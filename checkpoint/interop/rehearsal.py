"""A draft that goes nowhere: whoever writes it learns how many bytes it would have."""

from checkpoint.format.codec import Buffer
from checkpoint.interop.draft import Draft


def rehearsing() -> Draft:
    """Return a draft that keeps nothing of what is written to it but the number of bytes."""
    return Draft(_Nowhere(), "", url="", kept=frozenset(), attempt="rehearsal")


class _Nowhere:
    """What a draft needs of a file system, for files that nobody will read."""

    protocol = "nowhere"

    def makedirs(self, _path: str, **_options: object) -> None:
        """Make no folder."""

    def open(self, _path: str, _mode: str) -> "_Blank":
        """Open no file."""
        return _Blank()

    def mv(self, _path: str, _target: str) -> None:
        """Give nothing a name."""


class _Blank:
    def write(self, data: Buffer) -> int:
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
