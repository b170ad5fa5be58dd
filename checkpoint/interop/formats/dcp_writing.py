"""Writes checkpoints of torch.distributed.checkpoint, in chunks no larger than the budget allows."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import Unsupported
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.containers import Containers, containers_of
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.dcp_metadata import METADATA
from checkpoint.interop.formats.nesting import leaves_of, nest
from checkpoint.interop.formats.optimizer_dicts import Keys
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import blocks_of, check_global

_MAX_FILE_BYTES = 4 << 30
_MAX_CHUNK_BYTES = 512 << 20
_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing in a file: a chunk of a tensor, or (without a box) an object."""

    name: str
    value: Any
    box: Box | None

    def saving(self) -> Saving:
        """Return it ready to be written."""
        if self.box is None:
            return Saving(self.value)
        return Saving(Later(self.value.number, self.value.dtype, self.box.size))

    def blocks(self, contents: Contents, budget_bytes: int) -> Callable[[int], Iterator[memoryview]]:
        """Return what yields the chunk's bytes."""
        return lambda number: blocks_of(contents, number, budget_bytes, self.box)


def write_dcp(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a state that `torch.distributed.checkpoint.load` reads, into any number of ranks.

    Raises Unsupported for what its names cannot say.
    """
    check_global(contents.tensors, "dcp")
    told = containers_of(contents.about.extra) or Containers()
    leaves = leaves_of(nest(contents, told.dcp_keys or Keys.NAMES))
    names = {".".join(map(str, path)): path for path, _ in leaves}
    if len(names) != len(leaves):
        raise Unsupported("two things of the state would have one name, joined by dots")
    values = {".".join(map(str, path)): value for path, value in leaves}
    write_flat(draft, contents, Flat(values, names), budget_bytes)


@dataclass(frozen=True, slots=True)
class Flat:
    """Tensors of the contents (`Later`) and objects by their flat names.

    `names` say where in a nested state each belongs, if anywhere; `folder` where the files go, with its "/".
    """

    values: Mapping[str, Any]
    names: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    folder: str = ""


def write_flat(draft: Draft, contents: Contents, flat: Flat, budget_bytes: int) -> None:
    """Write files of chunks and objects; the metadata come last."""
    parts = [part for name, value in flat.values.items() for part in _parts(name, value)]
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for number, file_parts in enumerate(_files(parts)):
        path = f"__{number}_0.distcp"
        storage |= _places(path, file_parts)
        if flat.folder + path not in draft.kept:
            with draft.writing(flat.folder + path) as file:
                for part, _ in file_parts:
                    part.saving().write(file, part.blocks(contents, budget_bytes))
    metadata = Metadata(
        state_dict_metadata=_described(flat.values, parts),
        planner_data=dict(flat.names),
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=_VERSION,
    )
    with draft.writing(flat.folder + METADATA) as file:
        file.write(pickle.dumps(metadata))


def _parts(name: str, value: Any) -> Iterator[_Part]:
    if not isinstance(value, Later):
        yield _Part(name, value, None)
        return
    whole = Box.whole(value.shape)
    for box in split_box(whole, itemsize(value.dtype), _MAX_CHUNK_BYTES) or [whole]:
        yield _Part(name, value, box)


def _files(parts: Sequence[_Part]) -> list[list[tuple[_Part, int]]]:
    """Deal parts to files, in their order, each with its length."""
    files: list[list[tuple[_Part, int]]] = [[]]
    filled = 0
    for part in parts:
        num_bytes = part.saving().num_bytes
        if files[-1] and filled + num_bytes > _MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append((part, num_bytes))
        filled += num_bytes
    return files


def _places(path: str, parts: Sequence[tuple[_Part, int]]) -> dict[MetadataIndex, _StorageInfo]:
    """Return where everything in a file lies."""
    storage: dict[MetadataIndex, _StorageInfo] = {}
    offset = 0
    for part, num_bytes in parts:
        start = part.box.start if part.box is not None else None
        storage[MetadataIndex(part.name, start)] = _StorageInfo(path, offset, num_bytes)
        offset += num_bytes
    return storage


def _described(values: Mapping[str, Any], parts: Sequence[_Part]) -> dict[str, Any]:
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for part in parts:
        if part.box is not None:
            chunk = ChunkStorageMetadata(torch.Size(part.box.start), torch.Size(part.box.size))
            chunks.setdefault(part.name, []).append(chunk)
    return {
        name: TensorStorageMetadata(
            TensorProperties(dtype=torch_dtype(value.dtype)), torch.Size(value.shape), chunks[name]
        )
        if isinstance(value, Later)
        else BytesStorageMetadata()
        for name, value in values.items()
    }
