"""Restore: the newest whole checkpoint, read in few large ranges, and proved before it is handed out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.commit import fingerprint_sums
from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import TensorSpec, check_cover, group_by_tensor
from checkpoint.engine.tensors import torch_dtype, unflatten_state
from checkpoint.errors import Corrupt, FormatError, Incomplete, Mismatch, NoCheckpoint, NotFound
from checkpoint.format.codec import checksum, decode
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.layout import Box
from checkpoint.format.manifest import ChunkRecord, Manifest, chunks_of_page
from checkpoint.store.contract import Buffer, ByteRange, Store

NUM_READERS = 2
MAX_READ_BYTES = (
    32 << 20
)  # of one request; so at most NUM_READERS + 1 times as much is held besides the state
MAX_GAP_BYTES = 64 << 10  # reading over a gap is cheaper than another request
_MAX_NAMED = 5

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Fallback:
    """A checkpoint that was passed over, and why."""

    step: int
    why: str


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore read, and which newer checkpoints it had to pass over."""

    num_bytes: int
    num_requests: int
    fallbacks: tuple[Fallback, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A restored state (tensors on the CPU), the manifest it came by, and how."""

    state: Any
    manifest: Manifest
    report: RestoreReport


@dataclass(slots=True)
class _Request:
    """One ranged read: neighbouring chunks of one pack."""

    key: str
    start: int
    stop: int
    chunks: list[ChunkRecord] = field(default_factory=list)


def load(store: Store, step: int | None = None) -> Loaded:
    """Restore a checkpoint: that of `step`, or the newest that is whole.

    Every chunk's checksum and every tensor's fingerprint is verified. Without a step, a checkpoint that fails
    is passed over for the next older one, and `report.fallbacks` says so. Raises NoCheckpoint if there is
    none; for an explicit step whatever is wrong with it: Corrupt, Incomplete, Unsupported.
    """
    catalog = Catalog(store)
    if step is not None:
        return _load_one(store, catalog.manifest(step), ())
    fallbacks: list[Fallback] = []
    for candidate in reversed(catalog.steps()):
        try:
            return _load_one(store, catalog.manifest(candidate), tuple(fallbacks))
        except (FormatError, Incomplete, NoCheckpoint) as error:
            fallbacks.append(Fallback(candidate, f"{type(error).__name__}: {error}"))
    raise NoCheckpoint(_none_whole(fallbacks) if fallbacks else "there is no checkpoint in the store yet")


def check_fits(specs: Sequence[TensorSpec], manifest: Manifest) -> None:
    """Raise Mismatch, naming the first tensors that differ, if a checkpoint is not of this state."""
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    stored = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.tensors}
    wrong = [
        f"{name}: {_described(stored.get(name))} in the checkpoint, {_described(wanted.get(name))} here"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise Mismatch(
            f"the checkpoint of step {manifest.step} of run {manifest.run!r} is of another model: "
            f"{'; '.join(wrong[:_MAX_NAMED])}{more}. Use the job and settings it was saved with"
        )


def read_chunks(store: Store, manifest: Manifest) -> list[ChunkRecord]:
    """Read a checkpoint's index and prove that its chunks cover every tensor exactly once."""
    chunks: list[ChunkRecord] = []
    for page in manifest.pages:
        try:
            chunks += chunks_of_page(manifest, page, store.read(page.key)[0])
        except NotFound as error:
            raise Corrupt(f"the checkpoint of step {manifest.step} lacks its page {page.key}") from error
    places = group_by_tensor([chunk.tensor for chunk in chunks])
    sums = fingerprint_sums(chunks)
    for number, tensor in enumerate(manifest.tensors):
        check_cover(tensor.name, tensor.shape, [chunks[place].box for place in places.get(number, [])])
        if sums.get(number, 0) != tensor.fingerprint:
            raise Corrupt(f"the chunks of tensor {tensor.name!r} do not add up to its fingerprint")
    return chunks


def _load_one(store: Store, manifest: Manifest, fallbacks: tuple[Fallback, ...]) -> Loaded:
    chunks = read_chunks(store, manifest)
    arrays = [np.empty(tensor.shape, dtype_of(tensor.dtype).carrier) for tensor in manifest.tensors]

    def fetch(request: _Request) -> None:
        data = _read(store, request)
        for chunk in request.chunks:
            _place(
                manifest, chunk, data[chunk.offset - request.start :][: chunk.num_bytes], arrays[chunk.tensor]
            )

    requests = _coalesce(manifest, chunks)
    for _ in fan_out(fetch, requests, NUM_READERS):
        pass
    tensors = {
        tensor.name: _as_tensor(array, tensor.dtype)
        for tensor, array in zip(manifest.tensors, arrays, strict=True)
    }
    num_bytes = sum(request.stop - request.start for request in requests)
    report = RestoreReport(num_bytes, len(requests), fallbacks)
    return Loaded(unflatten_state(manifest.skeleton, tensors), manifest, report)


def _coalesce(manifest: Manifest, chunks: Sequence[ChunkRecord]) -> list[_Request]:
    """Join chunks that lie close together in a pack into requests of a bounded size."""
    requests: list[_Request] = []
    pack = -1
    for chunk in sorted(chunks, key=lambda one: (one.pack, one.offset)):
        stop = chunk.offset + chunk.num_bytes
        last = requests[-1] if requests and chunk.pack == pack else None
        if last is None or chunk.offset - last.stop > MAX_GAP_BYTES or stop - last.start > MAX_READ_BYTES:
            last = _Request(manifest.packs[chunk.pack].key, chunk.offset, stop)
            requests.append(last)
        pack = chunk.pack
        last.stop = max(last.stop, stop)
        last.chunks.append(chunk)
    return requests


def _read(store: Store, request: _Request) -> memoryview:
    try:
        data = store.read(request.key, [ByteRange(request.start, request.stop - request.start)])[0]
    except NotFound as error:
        raise Corrupt(f"{request.key} is missing or too short: {error}") from error
    return memoryview(data)


def _place(manifest: Manifest, chunk: ChunkRecord, stored: Buffer, target: Array) -> None:
    """Decode and prove one chunk, and copy it to its box."""
    tensor = manifest.tensors[chunk.tensor]
    kind = dtype_of(tensor.dtype)
    where = f"a chunk of {tensor.name!r} in {manifest.packs[chunk.pack].key} at {chunk.offset}"
    try:
        raw = decode(chunk.codec, stored, chunk.box.numel * kind.itemsize)
    except Corrupt as error:
        raise Corrupt(f"{where}: {error}") from error
    if checksum(raw) != chunk.checksum:
        raise Corrupt(f"{where} is not what was written: its checksum does not match")
    if fingerprint(raw, tensor.dtype, tensor.shape, chunk.box) != chunk.fingerprint:
        raise Corrupt(f"{where} belongs elsewhere: its fingerprint does not match")
    values = np.frombuffer(raw, kind.carrier).reshape(chunk.box.size)
    target[chunk.box.within(Box.whole(tensor.shape))] = values


def _as_tensor(array: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array).view(torch_dtype(dtype))


def _none_whole(fallbacks: Sequence[Fallback]) -> str:
    named = "; ".join(f"step {one.step}: {one.why}" for one in fallbacks[:_MAX_NAMED])
    others = ", ".join(str(one.step) for one in fallbacks[_MAX_NAMED:])
    return (
        f"no checkpoint is whole: {named}{f'; and steps {others}' if others else ''}. "
        "Run `holdfast verify`, restore the store from a backup, or start a new run"
    )


def _described(what: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{what[0]}{list(what[1])}" if what else "absent"
