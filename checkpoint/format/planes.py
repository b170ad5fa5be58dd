"""Byte planes of floating point numbers: exponents shrink, mantissas do not; so each is stored by itself.

A number is cut into fields, lowest first: whatever is below its upper 16 bits; then those, rotated left by
one: their lower byte (mantissa and sign), and their upper one (the exponent). Where most upper bytes are of a
few values, the two are left as they are, which is faster. docs/format.md has the layout.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import Corrupt
from checkpoint.format.exponents import ExponentCoder, decode_exponents, highest_exponent
from checkpoint.format.frames import WORTH_IT, Buffer, compress_by_entropy, decompress
from checkpoint.format.scratch import BLOCK, Scratch, scratch
from checkpoint.format.uppers import UpperCoder, decode_uppers, highest_upper

PLANE_WIDTHS = {  # bytes of the numbers that elements of a dtype consist of
    **dict.fromkeys(("float16", "bfloat16", "complex32"), 2),
    **dict.fromkeys(("float32", "complex64"), 4),
    **dict.fromkeys(("float64", "complex128"), 8),
}

_RAW, _FRAME, _CODES, _UPPERS = range(4)
_LOWER = {2: [], 4: [(0, 2)], 8: [(0, 4), (4, 2)]}  # below the upper 16 bits: where fields begin; their sizes
_DTYPES = {size: np.dtype(f"<u{size}") for size in (1, 2, 4)}
_HEAD = struct.Struct("<BB")  # width, number of fields
_FIELD = struct.Struct("<BBI")  # bytes of a number, how they are stored, stored bytes
_DOUBLE = 8  # bytes: their exponents are longer, so that too much of them would stay with the mantissas
_BLOCK = 1 << 16  # numbers that are joined at a time: they fit a core's cache, and malloc's free lists
_SLICES, _SLICE = 16, 128  # of the numbers that are looked at to decide
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


class _Stored(NamedTuple):
    """A field to be stored: as the parts, one after the other."""

    size: int
    kind: int
    parts: Sequence[Buffer]


def split_planes(data: Buffer, width: int) -> Buffer | None:
    """Return the fields of numbers of `width` bytes, one after the other; None if they would not shrink."""
    numbers = np.frombuffer(data, f"<u{width}")
    kinds, coder = _plan(_few(numbers), numbers.size)
    head = _HEAD.size + len(kinds) * _FIELD.size
    room = np.empty(head + numbers.nbytes, np.uint8)  # all fields as they are; most stay there
    ends = list(accumulate((size * numbers.size for size, _ in kinds), initial=head))
    planes = [room[start:end] for start, end in pairwise(ends)]
    _cut(numbers, [plane.view(_DTYPES[size]) for plane, (size, _) in zip(planes, kinds, strict=True)], coder)
    fields = [_stored(plane, size, kind, coder) for plane, (size, kind) in zip(planes, kinds, strict=True)]
    return _assembled(room, width, fields)


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
        if fields[-1].kind != _UPPERS:
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


def _plan(few: Array, count: int) -> tuple[list[tuple[int, int]], _Coder | None]:
    """Decide by a few of `count` numbers on the fields' sizes and kinds, and on the coder of the last."""
    width = few.itemsize
    lower = [kind for at, size in _LOWER[width] for kind in _kinds_of_lower(few, at, size)]
    upper = few if width == 2 else (few >> (8 * width - 16)).astype("<u2")
    if width != _DOUBLE and (highest := highest_upper(upper)) is not None:
        return [*lower, (1, _RAW), (1, _UPPERS)], UpperCoder(highest, count)
    highest = highest_exponent((upper >> 7).astype(np.uint8))
    coder = None if highest is None else ExponentCoder(highest, count)
    mantissas = (1, _FRAME if _shrinks((upper << 1) | (upper >> 15)) else _RAW)
    return [*lower, mantissas, (1, _CODES if coder else _FRAME)], coder


def _cut(numbers: Array, planes: Sequence[Array], coder: _Coder | None) -> None:
    """Fill the planes with the fields of the numbers; with a coder, the last goes there."""
    with scratch() as room:
        for first in range(0, numbers.size, BLOCK):
            here = slice(first, first + BLOCK)
            _cut_block(numbers[here], [plane[here] for plane in planes], coder, room)


def _cut_block(block: Array, planes: Sequence[Array], coder: _Coder | None, room: Scratch) -> None:
    at = 0
    for plane in planes[:-2]:
        _shifted(block, 8 * at, plane)
        at += plane.itemsize
    if at:
        block = _shifted(block, 8 * at, room.upper[: block.size])
    if isinstance(coder, UpperCoder):
        planes[-2][:] = block
        coder.add(block, room)
    else:
        _cut_rotated(block, planes[-2:], coder, room)


def _cut_rotated(block: Array, planes: Sequence[Array], coder: ExponentCoder | None, room: Scratch) -> None:
    upper, rotated, exponents = (each[: block.size] for each in room[:3])
    np.add(block, block, out=rotated)  # a shift by one, only faster
    np.right_shift(block, 15, out=upper)
    rotated |= upper
    planes[0][:] = rotated
    rotated >>= 8
    if coder is None:
        planes[1][:] = rotated
    else:
        exponents[:] = rotated
        coder.add(exponents, room)


def _shifted(block: Array, num_bits: int, into: Array) -> Array:
    """Put the bits of numbers from `num_bits` on into narrower ones."""
    if num_bits:
        np.right_shift(block, num_bits, out=into, casting="unsafe")
    else:
        into[:] = block
    return into


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


def _stored(plane: Plane, size: int, kind: int, coder: _Coder | None) -> _Stored:
    if kind in (_CODES, _UPPERS) and coder:
        return _Stored(1, kind, coder.body())
    if kind == _FRAME:
        frame = compress_by_entropy(plane.data)
        if len(frame) < _WORTH_ENTROPY * plane.size:
            return _Stored(1, _FRAME, [frame])
    return _Stored(size, _RAW, [plane.data])


def _assembled(room: Plane, width: int, fields: Sequence[_Stored]) -> Buffer | None:
    """Put heads and stored fields where they belong, from the first on; None if they are not worth it."""
    lengths = [sum(len(part) for part in field.parts) for field in fields]
    at = _HEAD.size + len(fields) * _FIELD.size
    if at + sum(lengths) > WORTH_IT * (room.size - at):
        return None
    heads = [_FIELD.pack(size, kind, length) for (size, kind, _), length in zip(fields, lengths, strict=True)]
    whole = room.data
    whole[:at] = b"".join([_HEAD.pack(width, len(fields)), *heads])
    is_there = True  # as long as nothing before it shrank
    for field, length in zip(fields, lengths, strict=True):
        is_there = is_there and field.kind == _RAW
        for part in () if is_there else field.parts:
            whole[at : at + len(part)] = part
            at += len(part)
        at += length if is_there else 0
    return whole[:at]


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
    if any(field.kind == _UPPERS for field in fields[:-1]):
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
    if field.kind == _UPPERS and field.size == 1:
        return decode_uppers(memoryview(field.body), count)
    raise Corrupt(f"a plane of kind {field.kind} cannot hold {num_bytes} bytes in {len(field.body)}")
