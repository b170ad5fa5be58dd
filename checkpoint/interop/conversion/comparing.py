"""Two checkpoints, tensor by tensor, whatever their layouts and formats: equal bits, or how far apart."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.tensors import torch_dtype
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.conversion.contract import (
    Array,
    ConversionSettings,
    GlobalTensors,
    Listener,
    Progress,
    unheard,
)

_BAND_BYTES = 4 << 20


class Verdict(Enum):
    """What became of one name."""

    EQUAL = "equal"
    DIFFERENT = "different"
    DTYPE = "dtype"  # of equal shape and another dtype
    SHAPE = "shape"
    MISSING = "missing"  # in the second
    EXTRA = "extra"  # in the second


@dataclass(frozen=True, slots=True)
class Compared:
    """How a tensor of the first checkpoint compares with the second's of the same name.

    `max_abs` is the largest difference of two elements, infinite if only one of them is a number; None where
    there is nothing to subtract. `num_different` elements have other bits (or values, in another dtype).
    """

    name: str
    verdict: Verdict
    first: TensorSpec | None
    second: TensorSpec | None
    max_abs: float | None = None
    num_different: int = 0


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: its tensors, their fingerprints where it tells them, and other names of weights.

    `settle` sees that what was read of it is what checksums in its files say.
    """

    contents: GlobalTensors
    fingerprints: Mapping[str, int]
    ties: Mapping[str, str] = field(default_factory=dict)
    settle: Callable[[], None] = lambda: None

    def numbers(self) -> dict[str, int]:
        """Return the number of each tensor by its name, and by its other names if it is tied."""
        named = {spec.name: number for number, spec in enumerate(self.contents.tensors)}
        for other, name in self.ties.items():
            if f"model/{name}" in named:
                named.setdefault(f"model/{other}", named[f"model/{name}"])
        return named


@dataclass(frozen=True, slots=True)
class _Band:
    """A part of two tensors to be compared; `name` is theirs, the numbers are each side's."""

    name: str
    numbers: tuple[int, int]
    box: Box


def compare(
    first: Side, second: Side, *, settings: ConversionSettings | None = None, listener: Listener = unheard
) -> list[Compared]:
    """Compare all tensors; names of both, in the first one's order. What is proved equal is not read."""
    left, right = first.numbers(), second.numbers()
    own = {spec.name for side in (first, second) for spec in side.contents.tensors}
    found: dict[str, Compared] = {}
    bands: list[_Band] = []
    for name in [name for name in dict.fromkeys([*left, *right]) if name in own]:
        one = first.contents.tensors[left[name]] if name in left else None
        other = second.contents.tensors[right[name]] if name in right else None
        found[name] = Compared(name, _verdict(one, other, first, second), one, other)
        if one and other and found[name].verdict in (Verdict.DIFFERENT, Verdict.DTYPE):
            widest = max(itemsize(one.dtype), itemsize(other.dtype))
            boxes = split_box(Box.whole(one.shape), widest, _BAND_BYTES)
            bands += [_Band(name, (left[name], right[name]), box) for box in boxes]
    for name, (num_different, max_abs) in _measured(
        first, second, bands, settings or ConversionSettings(), listener
    ):
        found[name] = _added(found[name], num_different, max_abs)
    first.settle()
    second.settle()
    return [_settled(one) for one in found.values()]


def is_equal(compared: Iterable[Compared]) -> bool:
    """Whether two checkpoints hold the same tensors with the same bits."""
    return all(one.verdict is Verdict.EQUAL for one in compared)


def _verdict(one: TensorSpec | None, other: TensorSpec | None, first: Side, second: Side) -> Verdict:
    """Return what can be said before anything is read; DIFFERENT still means that it has to be."""
    if one is None or other is None:
        return Verdict.EXTRA if one is None else Verdict.MISSING
    if one.shape != other.shape:
        return Verdict.SHAPE
    if one.dtype != other.dtype:
        return Verdict.DTYPE
    known = first.fingerprints.get(one.name), second.fingerprints.get(other.name)  # their own, if tied
    return Verdict.EQUAL if None not in known and known[0] == known[1] else Verdict.DIFFERENT


def _measured(
    first: Side, second: Side, bands: Sequence[_Band], settings: ConversionSettings, listener: Listener
) -> Iterable[tuple[str, tuple[int, float | None]]]:
    def measure(band: _Band) -> tuple[int, float | None]:
        specs = first.contents.tensors[band.numbers[0]], second.contents.tensors[band.numbers[1]]
        one = first.contents.read([(band.numbers[0], band.box)])[0]
        other = second.contents.read([(band.numbers[1], band.box)])[0]
        return difference((one, specs[0].dtype), (other, specs[1].dtype))

    for number, (band, measured) in enumerate(
        zip(bands, fan_out(measure, bands, settings.num_workers), strict=True)
    ):
        listener(Progress(f"comparing {band.name}", number + 1, len(bands)))
        yield band.name, measured


def difference(one: tuple[Array, str], other: tuple[Array, str]) -> tuple[int, float | None]:
    """Return how many elements differ, and by how much at most; each is (bits, dtype)."""
    if one[1] == other[1]:
        differs = one[0] != other[0]
        if one[0].dtype.kind == "c":  # bits, as a NaN is not equal to itself
            pairs = [np.ascontiguousarray(bits).view(np.uint64) for bits, _ in (one, other)]
            differs = (pairs[0] != pairs[1]).reshape(*one[0].shape, 2).any(axis=-1)
        if not differs.any():
            return 0, 0.0
        left, right = (_values(bits[differs], dtype) for bits, dtype in (one, other))
        return int(differs.sum()), _distance(left, right)
    left, right = _values(*one), _values(*other)
    unequal = (left != right) & ~(torch.isnan(left) & torch.isnan(right))
    return int(unequal.sum()), _distance(left, right)


def _values(bits: Array, dtype: str) -> torch.Tensor:
    raw = torch.from_numpy(
        np.ascontiguousarray(bits).view(f"i{bits.itemsize}" if bits.itemsize < 16 else None)
    )
    values = raw.view(torch_dtype(dtype))
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    if not left.numel():
        return 0.0
    apart = (left - right).abs()
    apart[(left == right) | (torch.isnan(left) & torch.isnan(right))] = 0.0  # equal infinities, NaNs
    return float(torch.nan_to_num(apart, nan=math.inf, posinf=math.inf).max())


def _added(one: Compared, num_different: int, max_abs: float | None) -> Compared:
    known = [value for value in (one.max_abs, max_abs) if value is not None]
    return Compared(
        one.name,
        one.verdict,
        one.first,
        one.second,
        max(known, default=None),
        one.num_different + num_different,
    )


def _settled(one: Compared) -> Compared:
    """Return the verdict after reading: without a different element, a tensor is equal."""
    is_equal_after_all = one.verdict is Verdict.DIFFERENT and one.num_different == 0
    verdict = Verdict.EQUAL if is_equal_after_all else one.verdict
    return Compared(one.name, verdict, one.first, one.second, one.max_abs, one.num_different)
