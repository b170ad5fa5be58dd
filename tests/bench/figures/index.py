"""The index of a checkpoint of a million chunks: what it takes to open it, and to find one tensor."""

import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from statistics import median

from checkpoint import Manifest
from checkpoint.engine.candidate import Candidate, Sources
from checkpoint.engine.reading import Tally
from checkpoint.engine.source import sources_of
from checkpoint.format.box import Box
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key, page_key
from checkpoint.format.manifest import encode_manifest, encode_page, page_ref
from checkpoint.format.records import MAX_CHUNK_BYTES, ChunkRecord, PackRef, TensorRecord
from checkpoint.store.local import LocalStore
from tests.bench.harness import Effort, Goal, Row, row

_NUM_TENSORS, _CHUNKS_OF_TENSOR = 2000, 500
_TENSORS_OF_PAGE = 100
_STEP = 1


def index(effort: Effort) -> list[Row]:
    """Measure with a store in a directory: every check that a restore makes of an index is made."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        store = LocalStore(Path(directory))
        manifest = _write(store)
        opened, found = [], []
        for _ in range(1 if effort is Effort.QUICK else 3):
            opened.append(_opening_s(store, range(_NUM_TENSORS)))
            found.append(_opening_s(store, {_NUM_TENSORS // 2}))
    num_bytes = sum(page.num_bytes for page in manifest.pages)
    return [
        row(
            f"index: open and prove {_NUM_TENSORS * _CHUNKS_OF_TENSOR:,} chunks",
            "s",
            ours=median(opened),
            goal=Goal("<=", 5.0),
        ),
        row("index: find one of its 2,000 tensors", "s", ours=median(found)),
        row("index: bytes of its pages, per chunk", "B", ours=num_bytes / _NUM_TENSORS / _CHUNKS_OF_TENSOR),
    ]


def _opening_s(store: LocalStore, tensors: Collection[int]) -> float:
    """Return the seconds until the index is read and proved for some tensors, as a restore does it."""
    tally = Tally()
    started = time.perf_counter()
    Candidate(_STEP, Sources(sources_of(store), tally), tally).check_index(tensors)
    return time.perf_counter() - started


def _write(store: LocalStore) -> Manifest:
    """Write an index without any content: a page at a time, for a million records take a gigabyte."""
    box = Box((0, 0), (1024, 1024))
    shape = (_CHUNKS_OF_TENSOR * 1024, 1024)
    pages = []
    for number in range(_NUM_TENSORS // _TENSORS_OF_PAGE):
        first = number * _TENSORS_OF_PAGE
        chunks = [
            ChunkRecord(
                tensor=tensor,
                box=Box((chunk * 1024, 0), box.size),
                codec=Codec.RAW,
                pack=tensor,
                offset=chunk * MAX_CHUNK_BYTES,
                num_bytes=MAX_CHUNK_BYTES,
                checksum=bytes(16),
                fingerprint=1,
            )
            for tensor in range(first, first + _TENSORS_OF_PAGE)
            for chunk in range(_CHUNKS_OF_TENSOR)
        ]
        key, data = page_key(0, _STEP, "local", number + 1), encode_page(chunks)
        store.put(key, data)
        pages.append(page_ref(key, data, len(chunks)))
    manifest = Manifest(
        run="bench",
        step=_STEP,
        generation=0,
        token="",
        created_utc="",
        spec_digest="",
        tensors=tuple(
            TensorRecord(f"layers.{number}.weight", "float32", shape, _CHUNKS_OF_TENSOR)
            for number in range(_NUM_TENSORS)
        ),
        packs=tuple(
            PackRef(f"packs/000000-local-{number:06d}", _CHUNKS_OF_TENSOR * MAX_CHUNK_BYTES)
            for number in range(_NUM_TENSORS)
        ),
        pages=tuple(pages),
        skeleton=None,
        meta={},
    )
    store.put(manifest_key(_STEP), encode_manifest(manifest))
    return manifest
