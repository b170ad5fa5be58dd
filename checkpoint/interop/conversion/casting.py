"""Casts between floating-point types: the one that converts, and a simpler one that it is held against.

The two share no code: torch casts, numpy's integers say what should have come out. Either way a value that is
no number becomes the type's one quiet NaN, since what a cast makes of a NaN's payload depends on the machine.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import FormatError, Mismatch, Misuse
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.conversion.contract import Array, GlobalTensors, Overflow, Wish

FLOATS = ("float16", "bfloat16", "float32", "float64")
SHORT_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_BAND_BYTES = 8 << 20
_STRETCH = 1 << 16  # elements that are cast at a time
_PART_BYTES = 2 << 20  # of doubles


def parse_dtype(text: str) -> str:
    """Return the dtype of a name or a short name such as "bf16". Raises FormatError."""
    name = SHORT_NAMES.get(text, text)
    if name not in FLOATS:
        raise FormatError(f"weights cannot be cast to {text!r}: use one of {', '.join(FLOATS)}")
    return name


def note_uncast(specs: Iterable[TensorSpec], dtype: str | None) -> list[str]:
    """Tell of weights that a cast leaves as they are: floats of types that are none of `FLOATS`."""
    kinds = Counter(one.dtype for one in specs if one.name.startswith("model/") and one.dtype not in FLOATS)
    return [
        f"{number} tensors keep their type, {kind}: only {', '.join(FLOATS)} are cast"
        for kind, number in sorted(kinds.items())
        if dtype is not None and kind.startswith("float")
    ]


class Cast:
    """Global tensors of which some are cast: `dtypes` says to what, by name."""

    def __init__(self, source: GlobalTensors, dtypes: Mapping[str, str]) -> None:
        self._source = source
        self._from = [spec.dtype for spec in source.tensors]
        self.tensors: Sequence[TensorSpec] = [
            TensorSpec(spec.name, dtypes.get(spec.name, spec.dtype), spec.shape) for spec in source.tensors
        ]

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return the bits of boxes, cast."""
        found = self._source.read(wishes)
        return [
            cast(bits, self._from[number], self.tensors[number].dtype)
            for bits, (number, _) in zip(found, wishes, strict=True)
        ]


def cast(bits: Array, old: str, new: str) -> Array:
    """Return the bits of values in another type, rounded to nearest, ties to even."""
    if old == new:
        return bits
    flat, made = bits.reshape(-1), np.empty(bits.size, dtype_of(new).carrier)
    for first in range(0, flat.size, _STRETCH):
        made[first : first + _STRETCH] = _cast(flat[first : first + _STRETCH], old, new)
    return made.reshape(bits.shape)


def parts_of(box: Box) -> list[Box]:
    """Cut a box where values are changed, for which there are several doubles of each at a time."""
    return split_box(box, itemsize("float64"), _PART_BYTES)


def _cast(bits: Array, old: str, new: str) -> Array:
    integers = {2: np.int16, 4: np.int32, 8: np.int64}
    values = torch.from_numpy(bits.view(integers[bits.itemsize])).view(torch_dtype(old))
    if old == "float64" and new in ("float16", "bfloat16"):
        values = _rounded_to_odd(values)
    made = values.to(torch_dtype(new))
    made = made.masked_fill(torch.isnan(made), float("nan"))
    whole: Array = made.view(getattr(torch, f"int{8 * made.itemsize}")).numpy()
    return whole.view(dtype_of(new).carrier)


def _rounded_to_odd(values: torch.Tensor) -> torch.Tensor:
    """Return doubles as floats that another rounding makes what it makes of the doubles.

    What is not exact is cut off, and its last bit set: so it lies on the side of a tie where the double does.
    (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 57, 2008.)
    """
    single = values.to(torch.float32)
    back, bits = single.to(torch.float64), single.view(torch.int32)
    is_inexact = (back != values) & ~torch.isnan(values)
    cut = torch.where(back.abs() > values.abs(), bits - 1, bits)
    return torch.where(is_inexact, cut | 1, bits).view(torch.float32)


class Reach:
    """Counts the numbers that are none any more in the type that they were cast to. Thread-safe."""

    def __init__(self) -> None:
        self._lost: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def see(self, name: str, were_numbers: Array, made: Array, new: str) -> None:
        """Count what is infinite in the new type and was a number before."""
        number = int((were_numbers & np.isinf(_as_numbers(made, new))).sum())
        if number:
            with self._lock:
                self._lost[name, new] = self._lost.get((name, new), 0) + number

    def settle(self, overflow: Overflow) -> list[str]:
        """Return a note for each tensor that lost something. Raises Misuse unless that is allowed."""
        notes = [
            f"{number} elements of {name} are beyond {new}, and became infinite"
            for (name, new), number in sorted(self._lost.items())
        ]
        if notes and overflow is Overflow.REFUSED:
            raise Misuse(
                f"{'; '.join(notes[:5])} (in {len(notes)} tensors): another dtype (--dtype, or the "
                "rules') holds them, or --allow-overflow lets them go; nothing was committed"
            )
        return notes


def reference_fingerprint(source: GlobalTensors, number: int, *, new: str, known: int, reach: Reach) -> int:
    """Return the fingerprint that a source's tensor has when it is cast, by the simpler code.

    Raises Mismatch if what is cast has not the fingerprint that the source's tensor is known by.
    """
    spec = source.tensors[number]
    total = plain = 0
    for band in bands_of(spec):
        read = source.read([(number, band)])[0]
        for part in parts_of(band):
            bits = np.ascontiguousarray(read[part.within(band)])
            plain += fingerprint(bits, spec.dtype, spec.shape, part)
            made = reference_cast(bits, spec.dtype, new)
            reach.see(spec.name, are_numbers(bits, spec.dtype), made, new)
            total += fingerprint(made, new, spec.shape, part)
    if plain % MODULUS != known:
        raise Mismatch(f"the content of {spec.name!r}, as it was cast, differs from the source's")
    return total % MODULUS


def bands_of(spec: TensorSpec) -> list[Box]:
    """Return the boxes in which a tensor is read for its reference."""
    return split_box(Box.whole(spec.shape), itemsize(spec.dtype), _BAND_BYTES)


def reference_cast(bits: Array, old: str, new: str) -> Array:
    """Return the bits of values in another type: from one as wide as both, as by a textbook."""
    values = _as_numbers(bits.reshape(-1), old)  # numpy makes scalars of what has no dims
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if new == "bfloat16":
            is_wide = values.dtype == np.float64
            return (_double_to_bfloat16 if is_wide else _single_to_bfloat16)(values).reshape(bits.shape)
        made: Array = values.astype(np.dtype(new))
    made[np.isnan(made)] = np.nan
    return made.view(dtype_of(new).carrier).reshape(bits.shape)


def are_numbers(bits: Array, dtype: str) -> Array:
    """Tell which of some values are numbers, and neither infinite nor none."""
    return np.asarray(np.isfinite(_as_numbers(bits, dtype)))


def _as_numbers(bits: Array, dtype: str) -> Array:
    """Return values in a type of numpy's that has them all."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.dtype(dtype))


def _single_to_bfloat16(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16)


def _double_to_bfloat16(values: Array) -> Array:
    """Round to multiples of the last of 8 bits, ties to even: what is left is exact in a float."""
    finest = np.maximum(np.frexp(values)[1] - 8, -133)
    rounded = np.where(np.isfinite(values), np.ldexp(np.rint(np.ldexp(values, -finest)), finest), values)
    bits = rounded.astype(np.float32).view(np.uint32)
    made: Array = (bits >> np.uint32(16)).astype(np.uint16)
    made[np.isnan(values)] = 0x7FC0
    return made
