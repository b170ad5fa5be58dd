"""Byte planes of floating point numbers: exponents shrink, mantissas do not; so each is stored by itself.

A number is cut into fields, lowest first: whatever is below its upper 16 bits; then those, rotated left by
one: their lower byte (mantissa and sign), and their upper one (the exponent). Where most upper bytes are of a
few values, the two are left as they are, which is faster. docs/format.md has the layout.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.exponents import ExponentCoder, decode_exponents, highest_exponent
from checkpoint.format.frames import WORTH_IT, Buffer, compress_by_entropy, decompress
from checkpoint.format.scratch import BLOCK, Scratch, lend, scratch
from checkpoint.format.uppers import Packing, UpperCoder, choose_packing, decode_uppers, take_bytes

PLANE_WIDTHS = {  # bytes of the numbers that elements of a dtype consist of
    **dict.fromkeys(("float16", "bfloat16", "complex32"), 2),
    **dict.fromkeys(("float32", "complex64"), 4),
    **dict.fromkeys(("float64", "complex128"), 8),
}

_RAW, _FRAME, _CODES, _PAIRS, _TRIPLES = range(5)
_KINDS = {Packing.PAIRS: _PAIRS, Packing.TRIPLES: _TRIPLES}
_PACKINGS = {kind: packing for packing, kind in _KINDS.items()}  # of upper bytes, which are not rotated
_LOWER = {2: [], 4: [(0, 2)], 8: [(0, 4), (4, 2)]}  # below the upper 16 bits: where fields begin; their sizes
_DTYPES = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
_HEAD = struct.Struct("<BB")  # width, number of fields
_FIELD = struct.Struct("<BBI")  # bytes of a number, how they are stored, stored bytes
_DOUBLE = 8  # bytes: their exponents are longer, so that too much of them would stay with the mantissas
_BLOCK = 1 << 16  # numbers that are joined at a time: they fit a core's cache, and malloc's free lists
_SLICES, _SLICE = 16, 64  # of the numbers that are looked at to decide
_WORTH_ENTROPY = 0.8  # of a plane: coding one takes longer than all the rest
_FEW_EQUAL = 2 ** (-8 * _WORTH_ENTROPY)  # of all pairs: then the entropy (Renyi's, a lower bound) is too high

Array = NDArray[Any]
Plane = NDArray[np.uint8]
_Coder = ExponentCoder | UpperCoder


@dataclass(frozen=True, slots=True)
class _Field:
    """Some bytes of every number: `size` of them, stored as `body`."""

    size: int
    kind: int
    body: Buffer


def split_planes(data: Buffer, width: int) -> Buffer | None:
    """Return the fields of numbers of `width` bytes, one after the other; None if they would not shrink."""
    numbers = np.frombuffer(data, _DTYPES[width])
    with scratch() as room:
        kinds, coder = _plan(_few(numbers), numbers.size, room)
        at = _HEAD.size + len(kinds) * _FIELD.size
        whole = lend(at + numbers.nbytes)
        planes = []
        for size, _ in kinds:  # as they are; most stay there
            planes.append(np.ndarray(numbers.size, _DTYPES[size], whole, at))
            at += size * numbers.size
        for first in range(0, numbers.size, BLOCK):
            here = slice(first, first + BLOCK)
            _cut_block(numbers[here], [plane[here] for plane in planes], coder, room)
        end = _assemble(whole, width, kinds, coder)
    return whole[:end] if end else None


def join_planes(stored: Buffer, num_raw_bytes: int) -> memoryview:
    """Return the numbers. Makes no more than a few times `num_raw_bytes`, whatever the stored bytes claim.

    Raises Corrupt if they do not hold exactly that many.
    """
    view = memoryview(stored).cast("B")
    width, fields = _fields(view, num_raw_bytes)
    count = num_raw_bytes // width
    parts = [np.frombuffer(_content(field, count), f"<u{field.size}") for field in fields]
    numbers = np.empty(count, f"<u{width}")
    for first in range(0, count, _BLOCK):
        here = slice(first, first + _BLOCK)
        upper = parts[-1][here].astype("<u2")
        upper <<= 8
        upper |= parts[-2][here]
        if fields[-1].kind not in _PACKINGS:
            upper = (upper >> 1) | (upper << 15)
        block = upper.astype(numbers.dtype)
        block <<= 8 * (width - 2)
        at = 0
        for field, part in zip(fields[:-2], parts, strict=False):
            wide = part[here].astype(numbers.dtype)
            wide <<= 8 * at
            block |= wide
            at += field.size
        numbers[here] = block
    return numbers.view(np.uint8).data


def _plan(few: Array, count: int, room: Scratch) -> tuple[list[tuple[int, int]], _Coder | None]:
    """Decide by a few of `count` numbers on the fields' sizes and kinds, and on the coder of the last."""
    width = few.itemsize
    lower = [kind for at, size in _LOWER[width] for kind in _kinds_of_lower(few, at, size)]
    upper = few if width == 2 else (few >> (8 * width - 16)).astype("<u2")
    if width != _DOUBLE and (chosen := choose_packing(upper)):
        return [*lower, (1, _RAW), (1, _KINDS[chosen[0]])], UpperCoder(*chosen, count, room)
    highest = highest_exponent((upper >> 7).astype(np.uint8))
    coder = None if highest is None else ExponentCoder(highest, count, room)
    mantissas = (1, _FRAME if _shrinks((upper << 1) | (upper >> 15)) else _RAW)
    return [*lower, mantissas, (1, _CODES if coder else _FRAME)], coder


def _cut_block(block: Array, planes: Sequence[Array], coder: _Coder | None, room: Scratch) -> None:
    """Fill the planes with the fields of numbers; with a coder, the last goes there."""
    at = 0
    for plane in planes[:-2]:
        take_bytes(block, at, plane)
        at += plane.itemsize
    if at:
        upper = room.upper[: block.size]
        take_bytes(block, at, upper)
        block = upper
    if isinstance(coder, UpperCoder):
        take_bytes(block, 0, planes[-2])
        uppers = room.bytes[: block.size]
        take_bytes(block, 1, uppers)
        coder.add(uppers)
    else:
        _cut_rotated(block, planes[-2:], coder, room)


def _cut_rotated(block: Array, planes: Sequence[Array], coder: ExponentCoder | None, room: Scratch) -> None:
    rotated, sign = room.rotated[: block.size], room.signs[: block.size]
    np.add(block, block, out=rotated)  # a shift by one, only faster
    np.right_shift(block, 15, out=sign)
    rotated |= sign
    take_bytes(rotated, 0, planes[0])
    if coder is None:
        take_bytes(rotated, 1, planes[1])
    else:
        exponents = room.bytes[: block.size]
        take_bytes(rotated, 1, exponents)
        coder.add(exponents)


def _few(numbers: Array) -> Array:
    """Return some of the numbers, from all over."""
    length = len(numbers) // _SLICES
    return numbers[: length * _SLICES].reshape(_SLICES, length)[:, :_SLICE].reshape(-1)


def _kinds_of_lower(few: Array, at: int, size: int) -> list[tuple[int, int]]:
    """Decide how bytes from `at` on are stored: together, which is fast, if none of them shrinks."""
    each = [_shrinks(few >> (8 * place)) for place in range(at, at + size)]
    return [(1, _FRAME if shrinks else _RAW) for shrinks in each] if any(each) else [(size, _RAW)]


def _shrinks(few: Array) -> bool:
    """Tell it of the lowest byte of some numbers."""
    plane = few.astype(np.uint8)
    counts = np.bincount(plane, minlength=256)
    if counts.dot(counts) < _FEW_EQUAL * few.size**2:
        return False
    return len(compress_by_entropy(plane.data)) < _WORTH_ENTROPY * few.size


def _assemble(whole: memoryview, width: int, kinds: Sequence[tuple[int, int]], coder: _Coder | None) -> int:
    """Put heads and fields where they belong, from the first on; return their end, or 0 if not worth it."""
    heads = [_HEAD.pack(width, len(kinds))]
    end = at = _HEAD.size + len(kinds) * _FIELD.size
    count = (len(whole) - at) // width
    most = at + WORTH_IT * count * width
    for size, planned in kinds:
        plane = whole[at : at + size * count]
        kind, parts = _stored(plane, planned, coder)
        length = sum(map(len, parts))
        if end + length > most:
            return 0
        heads.append(_FIELD.pack(size, kind, length))
        if kind != _RAW or end != at:
            for part in parts:
                whole[end : end + len(part)] = part
                end += len(part)
        else:
            end += length
        at += size * count
    whole[: sum(map(len, heads))] = b"".join(heads)
    return end


def _stored(plane: memoryview, kind: int, coder: _Coder | None) -> tuple[int, Sequence[Buffer]]:
    """Return how a field that was cut is stored, and as what, in parts."""
    if coder and kind >= _CODES:
        return kind, coder.body()
    if kind == _FRAME:
        frame = compress_by_entropy(plane)
        if len(frame) < _WORTH_ENTROPY * len(plane):
            return _FRAME, [frame]
    return _RAW, [plane]


def _fields(view: memoryview, num_raw_bytes: int) -> tuple[int, list[_Field]]:
    """Read width and fields of stored planes, and see that they are whole."""
    width, num_fields = _HEAD.unpack_from(view) if len(view) >= _HEAD.size else (0, 0)
    at = _HEAD.size + num_fields * _FIELD.size
    if width not in _LOWER or num_raw_bytes % width or len(view) < at:
        raise Corrupt(f"{len(view)} bytes of planes cannot hold {num_raw_bytes} bytes of numbers")
    fields = []
    for number in range(num_fields):
        size, kind, length = _FIELD.unpack_from(view, _HEAD.size + number * _FIELD.size)
        fields.append(_Field(size, kind, view[at : at + length]))
        at += length
    if any(field.kind in _PACKINGS for field in fields[:-1]):
        raise Corrupt("upper bytes of numbers as codes can only be the last of their planes")
    sizes = [field.size for field in fields]
    if at != len(view) or sum(sizes) != width or sizes[-2:] != [1, 1] or not {1, 2, 4}.issuperset(sizes):
        raise Corrupt(f"planes of the sizes {sizes} do not make up {len(view)} bytes, or numbers of {width}")
    return width, fields


def _content(field: _Field, count: int) -> Buffer:
    """Return a field of `count` numbers. Raises Corrupt if it is of another length."""
    num_bytes = count * field.size
    if field.kind == _RAW and len(field.body) == num_bytes:
        return field.body
    if field.kind == _FRAME:
        return decompress(field.body, num_bytes)
    if field.kind == _CODES and field.size == 1:
        return decode_exponents(memoryview(field.body), count)
    if field.kind in _PACKINGS and field.size == 1:
        return decode_uppers(memoryview(field.body), count, _PACKINGS[field.kind])
    raise Corrupt(f"a plane of kind {field.kind} cannot hold {num_bytes} bytes in {len(field.body)}")
