"""Files of torch.save: the tree that they hold, with tensors as extents of the file. Nothing is executed.

The zip format of today and the one before it are both read by ranges: the pickle, and the bytes of the
tensors that are asked for.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.extents import Extent, check_repeats, check_shape
from checkpoint.interop.formats.inert import (
    MAX_PICKLE_BYTES,
    Dict,
    Name,
    Shut,
    StandIns,
    check_bounded,
    load_inert,
)
from checkpoint.interop.formats.opcodes import end_of_pickle
from checkpoint.interop.formats.windows import Window
from checkpoint.interop.place import Place

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_FIRST_BYTES = 64 << 10
_UNTOLD = 0  # the CRC-32 where torch was told to write none
_STORAGES = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}


@dataclass(frozen=True, slots=True)
class Storage(Shut):
    """A piece of memory that tensors share; `key` says where in the file it is."""

    key: str
    dtype: str
    num_bytes: int

    __setstate__ = Shut.__setstate__


@dataclass(frozen=True, slots=True)
class Stored(Shut):
    """A tensor in a tree: a view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    __setstate__ = Shut.__setstate__


@dataclass(frozen=True, slots=True)
class Archive:
    """What a file of torch.save holds. Tensors in the tree are `Stored`; `locate` finds one's bytes."""

    tree: Any
    locate: Callable[[Stored], Extent]


def read_archive(place: Place, path: str, more: StandIns | None = None) -> Archive:
    """Read the tree of a file.

    Raises Corrupt, or Unsupported for what cannot be read without executing, and for tensors that repeat a
    small storage beyond reason.
    """
    return read_part(place, path, (0, place.files[path]), more)


def read_part(place: Place, path: str, span: tuple[int, int], more: StandIns | None = None) -> Archive:
    """Read the tree of a part of a file, from one byte to another."""
    return read_window(Window(place, path, span), more)


def read_window(window: Window, more: StandIns | None = None) -> Archive:
    """Read the tree of a part of a file of which both ends are there already."""
    read = _read_zip if window.read_at(0, 4) == _ZIP else _read_legacy
    archive = read(window, dict(more or {}))
    check_bounded(archive.tree, str(window))
    return archive


def is_archive(place: Place, path: str) -> bool:
    """Tell whether a file begins like one of torch.save."""
    head = place.read(path, 0, min(14, place.files[path]))
    return head.startswith(_ZIP) or (head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head)


def _read_zip(window: Window, more: StandIns) -> Archive:
    where = str(window)
    try:
        with zipfile.ZipFile(cast(BinaryIO, window.as_file())) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            _check_entries(archive, window)
    # Of a version that zipfile does not know: NotImplementedError; names that are no text: ValueError.
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise Corrupt(f"{where} is no sound zip of torch.save: {error}") from error
    root = _root(entries, where)

    def span(name: str) -> tuple[int, int]:
        entry = entries.get(f"{root}/{name}")
        if entry is None:
            raise Corrupt(f"{where} lacks {name}")
        header = window.read_at(entry.header_offset, _LOCAL_HEADER_BYTES)
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return entry.header_offset + _LOCAL_HEADER_BYTES + skipped, entry.file_size

    if f"{root}/byteorder" in entries and window.read_at(*span("byteorder")) != b"little":
        raise Unsupported(f"{where} was written on a machine that stores its numbers the other way around")
    data = window.read_at(*span("data.pkl"))
    told = entries[f"{root}/data.pkl"].CRC
    if told not in (_UNTOLD, zlib.crc32(data)):
        raise Corrupt(f"the pickle of {where} was damaged after it was written: its CRC-32 is not {told:08x}")

    def locate(stored: Stored) -> Extent:
        name = f"data/{stored.storage.key}"
        begin, num_bytes = span(name)
        told = entries[f"{root}/{name}"].CRC
        if told != _UNTOLD:
            window.expect(name, (begin, num_bytes), told)
        return _extent(window, stored, begin, num_bytes)

    return Archive(load_inert(data, f"the pickle of {where}", _tensors(more), _persistent), locate)


def _check_entries(archive: zipfile.ZipFile, window: Window) -> None:
    """See that entries are there once, uncompressed, and do not lie on top of each other."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if len({entry.filename for entry in entries}) != len(entries):
        raise Corrupt(f"{window} has several entries of one name")
    reached = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Unsupported(f"{entry.filename} of {window} is compressed: torch.save does not do that")
        if entry.header_offset < reached:
            raise Corrupt(f"{entry.filename} of {window} lies on top of another entry")
        reached = entry.header_offset + _LOCAL_HEADER_BYTES + entry.file_size
    if reached > window.num_bytes:
        raise Corrupt(f"{entries[-1].filename} of {window} reaches beyond its end: it was cut short")


def _root(entries: Mapping[str, zipfile.ZipInfo], where: str) -> str:
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Corrupt(f"{where} is a zip, but not of torch.save: it holds {sorted(entries)[:5]}")
    if f"{roots[0]}/constants.pkl" in entries:
        raise Unsupported(f"{where} is a TorchScript program: save the model's state_dict instead")
    if entries[f"{roots[0]}/data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise Unsupported(f"the pickle of {where} is too large to look through")
    return roots[0]


def _read_legacy(window: Window, more: StandIns) -> Archive:
    where = str(window)
    parts, begin = _pickles(window)
    magic, protocol, system = (load_inert(part, where, {}, _nothing) for part in parts[:3])
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise Corrupt(f"{where} is neither a zip nor an older file of torch.save")
    if system.get("little_endian") is not True:
        raise Unsupported(f"{where} was written on a machine that stores its numbers the other way around")
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> Any:
        storage = _persistent(pid[:5] if isinstance(pid, tuple) and pid[5:] == (None,) else pid)
        return storages.setdefault(storage.key, storage)

    tree = load_inert(parts[3], f"the pickle of {where}", _tensors(more), persistent)
    keys = load_inert(parts[4], where, {}, _nothing)
    if not isinstance(keys, list) or set(keys) != storages.keys() or len(set(keys)) != len(keys):
        raise Corrupt(f"{where} does not list the storages that its tensors are in")
    offsets: dict[str, int] = {}
    for key in keys:
        offsets[key] = begin + 8
        begin += 8 + storages[key].num_bytes
    if begin != window.num_bytes:
        raise Corrupt(f"{where} has {window.num_bytes} bytes, and its storages end at {begin}")

    def locate(stored: Stored) -> Extent:
        return _extent(window, stored, offsets[stored.storage.key], stored.storage.num_bytes)

    return Archive(tree, locate)


def _pickles(window: Window) -> tuple[list[bytes], int]:
    """Return the five pickles at the beginning of an older file, and where they end."""
    wanted = min(_FIRST_BYTES, window.num_bytes)
    while True:
        data = window.read_at(0, wanted)
        ends: list[int] = []
        while len(ends) < 5:
            end = end_of_pickle(data, ends[-1] if ends else 0, str(window))
            if end is None:
                break
            ends.append(end)
        if len(ends) == 5:
            return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)], ends[-1]
        if wanted == window.num_bytes or wanted >= MAX_PICKLE_BYTES:
            raise Corrupt(f"{window} is neither a zip nor an older file of torch.save, or was cut short")
        wanted = min(window.num_bytes, 4 * wanted)


def _extent(window: Window, stored: Stored, begin: int, size: int) -> Extent:
    """Return where a tensor lies within the file, seen to lie within its storage."""
    extent = Extent(
        window.path,
        window.offset + begin + stored.offset * itemsize(stored.dtype),
        stored.dtype,
        stored.shape,
        stored.strides,
    )
    stop = begin + stored.offset * itemsize(stored.dtype) + extent.num_bytes
    if stored.storage.num_bytes != size or stop > begin + size or stop > window.num_bytes:
        raise Corrupt(
            f"storage {stored.storage.key} of {window} has {size} bytes instead of "
            f"{stored.storage.num_bytes}, or a tensor in it reaches beyond it"
        )
    return extent


def _persistent(pid: Any) -> Storage:
    match pid:
        case ("storage", Name(text=kind), str(key), str(), int(numel)) if kind in DTYPE_OF and numel >= 0:
            return Storage(key, DTYPE_OF[kind], numel * itemsize(DTYPE_OF[kind]))
    raise Corrupt(f"it refers to {ascii(pid)[:80]}, which is no storage")


def _nothing(pid: Any) -> Any:
    raise Corrupt(f"it refers to {ascii(pid)[:80]} outside of its tree")


def _view(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    return _view_as(storage, offset, size, stride, None, None, None, *rest[2:])


def _view_as(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Stored:
    """Make a tensor: what follows is whether it has a gradient, its hooks, its dtype, and its metadata."""
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise Corrupt("it makes a tensor of what is no storage")
    _, _, dtype, *metadata = rest
    shape, strides = check_shape(size, "a tensor"), check_shape(stride, "a tensor's strides")
    if len(shape) != len(strides):
        raise Corrupt(f"a tensor has the shape {shape} and the strides {strides}")
    if any(isinstance(one, dict) and any(one.values()) for one in metadata):
        raise Unsupported("it holds a tensor that is conjugated or negated only when read: resolve it first")
    name = dtype.text if isinstance(dtype, Name) else storage.dtype
    check_repeats(shape, name, storage.num_bytes)
    return Stored(storage, offset, name, shape, strides)


def _of_parameter(data: Any, *_: Any) -> Any:
    return data


def _of_subclass(make: Any, _kind: Any, args: Any, _state: Any = None) -> Any:
    return make(*args)


def _wrapped(*_: Any) -> Any:
    raise Unsupported(
        "it holds a DTensor or another tensor made of tensors, of which a file of torch.save has one rank's "
        "part only: save it with torch.distributed.checkpoint, or its full_tensor()"
    )


def _quantized(*_: Any) -> Any:
    raise Unsupported("it holds a quantized, sparse or nested tensor, which has no plain elements here")


DTYPE_OF = {f"{kind}Storage": dtype for kind, dtype in _STORAGES.items()}
STORAGE_OF = {dtype: kind for kind, dtype in DTYPE_OF.items() if kind != "UntypedStorage"}
_REBUILDS: StandIns = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_as,
    "torch._utils._rebuild_parameter": _of_parameter,
    "torch._utils._rebuild_parameter_with_state": _of_parameter,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    "torch._utils._rebuild_wrapper_subclass": _wrapped,
    "torch.distributed.tensor.DTensor": Name("DTensor"),
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _quantized,
    "torch._utils._rebuild_nested_tensor": _quantized,
    "torch.nn.parameter.Parameter": Name("Parameter"),
    "torch.Tensor": Name("Tensor"),
    **{f"torch.{kind}": Name(kind) for kind in DTYPE_OF},
    "torch.storage.UntypedStorage": Name("UntypedStorage"),
    "torch.storage.TypedStorage": Name("UntypedStorage"),
    "collections.OrderedDict": Dict,
}


def _tensors(more: StandIns) -> StandIns:
    return {**_REBUILDS, **more}
