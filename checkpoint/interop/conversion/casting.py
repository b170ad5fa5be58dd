"""Casts between floating-point types: the one that converts, and a simpler one that it is held against.

The two share no code: torch casts, numpy's integers say what should have come out. Either way a value that is
no number becomes the type's one quiet NaN, since what a cast makes of a NaN's payload depends on the machine.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import FormatError
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.conversion.contract import Array, GlobalTensors, Wish

FLOATS = ("float16", "bfloat16", "float32", "float64")
SHORT_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_BAND_BYTES = 8 << 20


def parse_dtype(text: str) -> str:
    """Return the dtype of a name or a short name such as "bf16". Raises FormatError."""
    name = SHORT_NAMES.get(text, text)
    if name not in FLOATS:
        raise FormatError(f"weights cannot be cast to {text!r}: use one of {', '.join(FLOATS)}")
    return name


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
    if old == new or not bits.size:
        return bits if old == new else np.empty(bits.shape, dtype_of(new).carrier)
    integers = {2: np.int16, 4: np.int32, 8: np.int64}
    values = torch.from_numpy(bits.view(integers[bits.itemsize])).view(torch_dtype(old))
    if (old, new) == ("float64", "float16") or (old, new) == ("float64", "bfloat16"):
        values = values.to(torch.float32)
    made = values.to(torch_dtype(new))
    made = made.masked_fill(torch.isnan(made), float("nan"))
    whole: Array = made.view(getattr(torch, f"int{8 * made.itemsize}")).numpy()
    return whole.view(dtype_of(new).carrier)


def reference_fingerprint(source: GlobalTensors, number: int, new: str) -> int:
    """Return the fingerprint that a source's tensor has when it is cast, by the simpler code."""
    spec = source.tensors[number]
    total = 0
    for band in bands_of(spec):
        bits = reference_cast(source.read([(number, band)])[0], spec.dtype, new)
        total += fingerprint(np.ascontiguousarray(bits), new, spec.shape, band)
    return total % MODULUS


def bands_of(spec: TensorSpec) -> list[Box]:
    """Return the boxes in which a tensor is read for its reference."""
    return split_box(Box.whole(spec.shape), itemsize(spec.dtype), _BAND_BYTES)


def reference_cast(bits: Array, old: str, new: str) -> Array:
    """Return the bits of values in another type: by way of float32, as by a textbook."""
    if old == "bfloat16":
        values: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = bits.view(np.dtype(old))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if new == "float64":
            made: Array = values.astype(np.float64)
        else:
            single = values.astype(np.float32)
            if new == "bfloat16":
                return _rounded_to_bfloat16(single)
            made = single.astype(np.dtype(new))
    made[np.isnan(made)] = np.nan
    return made.view(dtype_of(new).carrier)


def _rounded_to_bfloat16(single: Array) -> Array:
    bits = single.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits.astype(np.uint64) + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    rounded[np.isnan(single)] = 0x7FC0
    return rounded.astype(np.uint16)
