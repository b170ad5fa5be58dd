"""The safetensors file format: its header, read as if it were hostile, and written."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.extents import Extent, check_shape, contiguous
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as the format has it
_MAX_CONTAINERS = 1 << 21  # in a header: a tensor takes three
_ALIGNMENT = 8
_METADATA = "__metadata__"

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F4": "float4_e2m1fn_x2",
}
_NAMES = {name: code for code, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds: where each tensor lies, and the texts that go with them."""

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]


def read_header(place: Place, path: str) -> Header:
    """Read and check a file's header: its tensors fill the rest of the file, one after the other.

    Raises Corrupt naming what is wrong, Unsupported for a dtype that has no place here.
    """
    where = place.spell(path)
    length = int.from_bytes(place.read(path, 0, _LENGTH_BYTES), "little")
    rest = place.files[path] - _LENGTH_BYTES
    if length > min(rest, _MAX_HEADER_BYTES):
        raise Corrupt(f"{where} says its header has {length} bytes, of {rest}: it is no safetensors file")
    entries = _parse(place.read(path, _LENGTH_BYTES, length), where)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Corrupt(f"the metadata of {where} is not a mapping of texts")
    spans = {name: _span(name, entry, where) for name, entry in entries.items()}
    _check_filled(spans, rest - length, where)
    base = _LENGTH_BYTES + length
    return Header(
        {
            name: Extent(path, base + begin, dtype, shape, contiguous(shape))
            for name, (dtype, shape, begin, _) in spans.items()
        },
        metadata,
    )


def header_bytes(tensors: Iterable[Foreign], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds these tensors in this order. Raises Unsupported."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in _NAMES or (_NAMES[tensor.dtype] == "F4" and not tensor.shape):
            raise Unsupported(
                f"{tensor} is of {tensor.dtype} {tensor.shape}, which safetensors does not have: cast it "
                "(--dtype, of real floats only), or leave it out (--only)"
            )
        stop = offset + math.prod(tensor.shape) * itemsize(tensor.dtype)
        dims = list(_stored_shape(tensor))
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": dims, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise Unsupported(f"a header of {len(text)} bytes is more than safetensors allows: more shards")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def sort_key(tensor: Foreign) -> tuple[int, str]:
    """Return what to sort tensors by, so that each is aligned: the widest dtypes first."""
    return -itemsize(tensor.dtype), tensor.name


def _stored_shape(tensor: Foreign) -> tuple[int, ...]:
    """Return the shape as the file tells it: it counts single elements where torch packs two in a byte."""
    if _NAMES[tensor.dtype] == "F4" and tensor.shape:
        return (*tensor.shape[:-1], 2 * tensor.shape[-1])
    return tensor.shape


def _parse(text: bytes, where: str) -> dict[str, Any]:
    if text.count(b"[") + text.count(b"{") > _MAX_CONTAINERS:
        raise Corrupt(f"the header of {where} has more in it than any sound one")
    try:
        entries = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"the header of {where} is no sound JSON: {error}") from error
    if not isinstance(entries, dict):
        raise Corrupt(f"the header of {where} is not a JSON object")
    return entries


def _span(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """Return a tensor's dtype and shape, and from where to where it lies."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Corrupt(f"the header of {where} describes {name!r} by {ascii(entry)[:80]}")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise Unsupported(f"{name!r} of {where} is of dtype {ascii(entry['dtype'])[:40]}, unknown here")
    shape = check_shape(entry["shape"], f"{name!r} of {where}")
    if dtype == _DTYPES["F4"]:
        if not shape or shape[-1] % 2:
            raise Unsupported(f"{name!r} of {where} has {shape} elements of 4 bits: not whole bytes")
        shape = (*shape[:-1], shape[-1] // 2)
    match entry["data_offsets"]:
        case [int(begin), int(stop)] if 0 <= begin <= stop:
            if stop - begin != math.prod(shape) * itemsize(dtype):
                raise Corrupt(f"{name!r} of {where} has {stop - begin} bytes, not those of {dtype} {shape}")
            return dtype, shape, begin, stop
    raise Corrupt(f"{name!r} of {where} lies at {ascii(entry['data_offsets'])[:80]}")


def _check_filled(spans: Mapping[str, tuple[str, tuple[int, ...], int, int]], size: int, where: str) -> None:
    """See that the tensors lie one after the other, without overlaps or gaps, to the end of the file."""
    reached, before = 0, "the header"
    for name, (_, _, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise Corrupt(f"{name!r} of {where} begins at {begin}, but {before!r} ends at {reached}")
        reached, before = stop, name
    if reached != size:
        raise Corrupt(f"the tensors of {where} end at {reached}, and it has {size} bytes: was it cut short?")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
