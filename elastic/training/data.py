"""Text as bytes: a table of documents, split by document, read by ranges. Does not choose what is read."""

import glob
import hashlib
import json
import math
import os
import re
import sysconfig
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import fsspec
import numpy as np
from numpy.typing import NDArray

from elastic.errors import JobRejected

SplitName = Literal["train", "validation"]

STDLIB = "stdlib"
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"})
_VALIDATION_PERMILLE = 60
_REMOTE_BLOCK_BYTES = 1 << 18
_REMOTE_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Document:
    """`num_bytes` from `start` on of the file at `path`; `name` is relative, so the same everywhere."""

    name: str
    path: str
    start: int
    num_bytes: int


@dataclass(slots=True)
class _Blocks:
    """The newest few blocks read from a remote file system: bounded memory, one request per block."""

    filesystem: Any
    kept: OrderedDict[tuple[str, int], bytes] = field(default_factory=OrderedDict)

    def read(self, path: str, start: int, stop: int) -> bytes:
        first = start // _REMOTE_BLOCK_BYTES
        blocks = [self._block(path, index) for index in range(first, -(-stop // _REMOTE_BLOCK_BYTES))]
        skipped = first * _REMOTE_BLOCK_BYTES
        return b"".join(blocks)[start - skipped : stop - skipped]

    def _block(self, path: str, index: int) -> bytes:
        block = self.kept.pop((path, index), None)
        if block is None:
            start = index * _REMOTE_BLOCK_BYTES
            block = bytes(self.filesystem.cat_file(path, start=start, end=start + _REMOTE_BLOCK_BYTES))
        self.kept[path, index] = block
        if len(self.kept) > _REMOTE_BLOCKS:
            self.kept.popitem(last=False)
        return block


class Corpus:
    """The documents of one split laid end to end, addressed by offset. Holds the table, never the text."""

    def __init__(self, documents: Sequence[Document], filesystem: Any | None = None) -> None:
        self.documents = tuple(documents)
        self._blocks = _Blocks(filesystem) if filesystem is not None else None
        self._ends = list(accumulate(document.num_bytes for document in self.documents))

    @property
    def num_bytes(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def digest(self) -> str:
        """Name the text: a hash of the table of documents, equal on every machine that has it."""
        table = [(document.name, document.start, document.num_bytes) for document in self.documents]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()

    def window(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Read the bytes `[offset, offset + num_bytes)`, over the documents' borders if need be."""
        if offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(
                f"window [{offset}, {offset + num_bytes}) leaves a text of {self.num_bytes} bytes"
            )
        parts = []
        index = bisect_right(self._ends, offset)
        while num_bytes > 0:
            document = self.documents[index]
            skip = offset - (self._ends[index] - document.num_bytes)
            taken = min(num_bytes, document.num_bytes - skip)
            parts.append(self._read(document, skip, taken))
            offset, num_bytes, index = offset + taken, num_bytes - taken, index + 1
        return np.frombuffer(b"".join(parts), np.uint8)

    def _read(self, document: Document, skip: int, num_bytes: int) -> bytes:
        start = document.start + skip
        if self._blocks is not None:
            data = self._blocks.read(document.path, start, start + num_bytes)
        else:
            descriptor = os.open(document.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, num_bytes, start)
            finally:
                os.close(descriptor)
        if len(data) != num_bytes:
            raise JobRejected(
                f"{document.path} shrank while it was being trained on: {len(data)} of {num_bytes} bytes "
                f"at {start}; "
                "put the data back, then resume the run"
            )
        return data


def open_corpus(source: str, split: SplitName) -> Corpus:
    """Find the text that `source` names and keep one split of it.

    `source` is "stdlib" (the Python standard library's sources, tests left out), a file, a directory, a
    glob, or any fsspec URL of these. Documents are dealt to the splits by a hash of their relative names,
    about 6 % to validation; where that would leave a split empty (one file, say), each document's last
    tenth is the validation text.

    Raises JobRejected if there is no text.
    """
    documents, filesystem = _documents(source)
    if not any(document.num_bytes for document in documents):
        raise JobRejected(
            f"no text found at {source!r}: name a file, a directory, a glob or a URL that has some"
        )
    return Corpus([document for document in _split(documents, split) if document.num_bytes], filesystem)


def unigram_entropy(corpus: Corpus, limit_bytes: int = 1 << 24) -> float:
    """Return the entropy of the corpus's byte frequencies in nats: what a model that ignores context can
    reach at best.

    At most about `limit_bytes` are read, in blocks spread evenly over the text.
    """
    counts = np.zeros(256, np.int64)
    for block in _spread(corpus, limit_bytes):
        counts += np.bincount(block, minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _spread(corpus: Corpus, limit_bytes: int, block_bytes: int = 1 << 16) -> Iterator[NDArray[np.uint8]]:
    num_blocks = math.ceil(corpus.num_bytes / block_bytes)
    stride = max(1, math.ceil(corpus.num_bytes / limit_bytes))
    for index in range(0, num_blocks, stride):
        offset = index * block_bytes
        yield corpus.window(offset, min(block_bytes, corpus.num_bytes - offset))


def _split(documents: Sequence[Document], split: SplitName) -> list[Document]:
    chosen = [document for document in documents if _is_validation(document.name) == (split == "validation")]
    if 0 < len(chosen) < len(documents):
        return chosen
    return [_cut(document, split) for document in documents]


def _is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 1000 < _VALIDATION_PERMILLE


def _cut(document: Document, split: SplitName) -> Document:
    tail = document.num_bytes // 10
    head = document.num_bytes - tail
    if split == "train":
        return Document(document.name, document.path, 0, head)
    return Document(document.name, document.path, head, tail)


def _documents(source: str) -> tuple[list[Document], Any | None]:
    if "://" in source or "::" in source:
        return _remote(source)
    names: Iterator[str]
    if source == STDLIB:
        root = sysconfig.get_path("stdlib")
        names = (name for name in _walk(root, _NOT_STDLIB) if name.endswith(".py"))
    elif os.path.isdir(source):
        root, names = source, _walk(source, frozenset({"__pycache__"}))
    elif os.path.isfile(source):
        root, name = os.path.split(source)
        names = iter([name])
    else:
        root = os.path.dirname(re.split(r"[*?\[]", source, maxsplit=1)[0]) or "."
        names = glob.iglob(os.path.relpath(source, root), root_dir=root, recursive=True)
    paths = ((name, os.path.join(root, name)) for name in sorted(names))
    return [
        Document(name.replace(os.sep, "/"), path, 0, os.path.getsize(path))
        for name, path in paths
        if os.path.isfile(path)
    ], None


def _walk(root: str, left_out: frozenset[str]) -> Iterator[str]:
    """Yield the relative names of all files below, but for hidden ones and those in directories left out."""
    for directory, directories, files in os.walk(root):
        directories[:] = [name for name in directories if name not in left_out and not name.startswith(".")]
        below = os.path.relpath(directory, root)
        yield from (os.path.normpath(os.path.join(below, name)) for name in files if not name.startswith("."))


def _remote(source: str) -> tuple[list[Document], Any]:
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        infos = (
            filesystem.glob(path, detail=True) if glob.has_magic(path) else filesystem.find(path, detail=True)
        )
    except (OSError, ValueError, ImportError) as error:
        raise JobRejected(f"the data at {source!r} cannot be listed: {error}") from error
    files = sorted((name, info["size"]) for name, info in infos.items() if info["type"] == "file")
    root = os.path.commonpath([os.path.dirname(name) for name, _ in files]) if files else ""
    return [Document(name[len(root) :].lstrip("/"), name, 0, size) for name, size in files], filesystem
