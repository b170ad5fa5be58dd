"""What `.metadata` of a torch distributed checkpoint says: which boxes of which tensor lie where."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.formats.extents import check_shape
from checkpoint.interop.formats.inert import Name, Record, load_inert
from checkpoint.interop.place import Place

METADATA = ".metadata"
_OF_RANK = re.compile(r"__\d+\.metadata")
_CLASSES = "torch.distributed.checkpoint.metadata."

Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """A part of a file: one chunk of a tensor, or one object."""

    path: str
    offset: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """Where it ends, exclusive."""
        return self.offset + self.num_bytes


@dataclass(slots=True)
class Chunked:
    """A tensor and the chunks that it was saved in."""

    dtype: str
    shape: tuple[int, ...]
    chunks: dict[Box, Item] = field(default_factory=dict)


@dataclass(slots=True)
class Directory:
    """All that was saved, by its flat name, and where in the nested state each name belongs."""

    tensors: dict[str, Chunked] = field(default_factory=dict)
    objects: dict[str, Item] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)


def metadata_files(files: Iterable[str]) -> list[str]:
    """Return the metadata among some files: one for all ranks, or one for each."""
    found = [name for name in files if name == METADATA]
    return found or sorted(name for name in files if _OF_RANK.fullmatch(name))


def read_directory(place: Place) -> Directory:
    """Read and check the metadata. Raises Corrupt, Incomplete if a file is missing, Unsupported."""
    directory = Directory()
    paths = metadata_files(place.files)
    if not paths:
        raise Incomplete(f"{place} has no {METADATA}: the save did not finish, or this is no such checkpoint")
    for path in paths:
        _Reading(place, path, directory).read()
    return directory


class _Reading:
    """One metadata file being read into the directory."""

    def __init__(self, place: Place, path: str, directory: Directory) -> None:
        self._place, self._directory = place, directory
        self._where = f"{path} in {place}"
        self._root = load_inert(place.read(path), self._where, {}, self._no_storage)

    def read(self) -> None:
        """Take in what the file says."""
        items = self._items(self._field(self._root, "storage_data", dict))
        for name, entry in self._field(self._root, "state_dict_metadata", dict).items():
            if not isinstance(name, str) or not isinstance(entry, Record):
                raise self._corrupt(f"describes {ascii(name)[:80]} by a {type(entry).__name__}")
            if entry.NAME == _CLASSES + "BytesStorageMetadata":
                self._directory.objects.setdefault(name, self._item(items, name, None))
            elif entry.NAME == _CLASSES + "TensorStorageMetadata":
                self._tensor(name, entry, items)
            else:
                raise Unsupported(f"{self._where} describes {name!r} by a {entry.NAME}, unknown here")
        planned = self._root.field("planner_data")
        for name, key in planned.items() if isinstance(planned, dict) else ():
            if not isinstance(key, tuple) or not key or not all(type(part) in (str, int) for part in key):
                raise self._corrupt(f"puts {ascii(name)[:80]} at {ascii(key)[:80]}")
            self._directory.keys[name] = key

    def _tensor(self, name: str, entry: Record, items: Mapping[Any, Item]) -> None:
        shape = check_shape(entry.field("size"), f"{name!r} of {self._where}")
        dtype = self._dtype(name, entry)
        known = self._directory.tensors.setdefault(name, Chunked(dtype, shape))
        if (known.dtype, known.shape) != (dtype, shape):
            raise self._corrupt(f"has {name!r} as {dtype} {shape}, others as {known.dtype} {known.shape}")
        for chunk in self._field(entry, "chunks", list):
            box = self._box(name, chunk)
            if not box.is_empty and box not in known.chunks:
                known.chunks[box] = self._item(items, name, box.start)

    def _dtype(self, name: str, entry: Record) -> str:
        properties = entry.field("properties")
        state = properties.__dict__.get("state") if isinstance(properties, Record) else None
        first = state.get("dtype") if isinstance(state, dict) else state[0] if state else None
        if not isinstance(first, Name):
            raise self._corrupt(f"does not say of which dtype {name!r} is")
        return dtype_of(first.text).name

    def _box(self, name: str, chunk: Any) -> Box:
        if not isinstance(chunk, Record):
            raise self._corrupt(f"describes a chunk of {name!r} by a {type(chunk).__name__}")
        start = check_shape(chunk.field("offsets"), f"a chunk of {name!r} of {self._where}")
        return Box(start, check_shape(chunk.field("sizes"), f"a chunk of {name!r} of {self._where}"))

    def _items(self, storage: Mapping[Any, Any]) -> dict[Any, Item]:
        """Return where everything lies, by name and (for chunks) where it starts."""
        items: dict[Any, Item] = {}
        for index, info in storage.items():
            if not isinstance(index, Record) or not isinstance(info, Record):
                raise self._corrupt("says where things lie in a way unknown here")
            if info.field("transform_descriptors"):
                raise Unsupported(
                    f"{self._where} says that {index.field('fqn')!r} is transformed "
                    f"({ascii(info.field('transform_descriptors'))[:80]}), compressed perhaps: save it plain"
                )
            item = self._checked(info)
            name, start = index.field("fqn"), index.field("offset")
            if not isinstance(name, str):
                raise self._corrupt(f"says where {ascii(name)[:80]} lies")
            key = (name, check_shape(start, f"a chunk of {name!r}") if start is not None else None)
            if items.setdefault(key, item) is not item:
                raise self._corrupt(f"says twice where {key} lies")
        return items

    def _checked(self, info: Record) -> Item:
        path, offset, length = (info.field(name) for name in ("relative_path", "offset", "length"))
        if not isinstance(path, str) or type(offset) is not int or type(length) is not int:
            raise self._corrupt(f"says that something lies at {ascii((path, offset, length))[:80]}")
        if path not in self._place.files:
            raise Incomplete(f"{path} is missing in {self._place}, and {self._where} says that it is there")
        if offset < 0 or length < 0 or offset + length > self._place.files[path]:
            raise Corrupt(
                f"{path} in {self._place} has {self._place.files[path]} bytes, and {length} should be at "
                f"{offset}: it was cut short, or is of another checkpoint"
            )
        return Item(path, offset, length)

    def _item(self, items: Mapping[Any, Item], name: str, start: tuple[int, ...] | None) -> Item:
        found = items.get((name, start))
        if found is None:
            raise Incomplete(f"{self._where} does not say where {name!r} (from {start} on) lies")
        return found

    def _field(self, record: Any, name: str, kind: type) -> Any:
        value = record.field(name) if isinstance(record, Record) else None
        if not isinstance(value, kind):
            raise self._corrupt(f"lacks the field {name!r}")
        return value

    def _no_storage(self, pid: Any) -> Any:
        raise self._corrupt(f"refers to {ascii(pid)[:80]}")

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"{self._where} {what}: it is no metadata of torch.distributed.checkpoint")
