"""Packs a made checkpoint with its golden tensors into a small file for the tests: `pack.py FOLDER FILE`."""

import gzip
import io
import sys
import tarfile
from pathlib import Path


def main(folder: Path, target: Path) -> None:
    """Write a tar that is the same whenever it is packed; programs that DeepSpeed adds are left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".py":
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size = path.stat().st_size
                tar.addfile(entry, io.BytesIO(path.read_bytes()))
    target.write_bytes(gzip.compress(buffer.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
