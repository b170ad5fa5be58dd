"""Where restored elements go: boxes of global tensors, and the memory of the caller that they fill."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpoint.engine.overlaps import overlaps_itself
from checkpoint.engine.tensors import dtype_name
from checkpoint.errors import FormatError, Mismatch
from checkpoint.format.codec import Buffer
from checkpoint.format.dtypes import dtype_of
from checkpoint.format.layout import Box
from checkpoint.format.manifest import Manifest

_MAX_NAMED = 5
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of the global tensor `name` of this dtype and shape, and what it is to fill.

    The target is a tensor of the box's size, a view or on any device, or writable memory that takes the box
    row by row. If the restore fails, what a target holds is undefined.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    target: torch.Tensor | Buffer


class Target:
    """The memory of one wanted box, as an array of the bits of its elements where that is possible."""

    def __init__(self, wanted: Wanted) -> None:
        try:
            wanted.box.within(Box.whole(wanted.shape))
        except FormatError as error:
            raise Mismatch(
                f"{wanted.name!r} of shape {list(wanted.shape)} has no such box: {error}"
            ) from None
        self.box = wanted.box
        self.itemsize = dtype_of(wanted.dtype).itemsize
        self._tensor: torch.Tensor | None = None  # where numpy has no view of it
        self._array: Array = np.zeros(0)
        if isinstance(wanted.target, torch.Tensor):
            tensor = _checked(wanted, wanted.target)
            if tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg():
                self._array = bits_of(tensor)
            else:
                self._tensor = tensor
        else:
            self._array = _array(wanted, wanted.target)

    @property
    def is_array(self) -> bool:
        """Whether it lies in this host's memory, so that many small parts take no longer than a large one."""
        return self._tensor is None

    def put(self, start: Sequence[int], values: Array) -> None:
        """Copy elements to where they belong; `start` is their first one's place in the global tensor."""
        slices = tuple(
            slice(at - origin, at - origin + size)
            for at, origin, size in zip(start, self.box.start, values.shape, strict=True)
        )
        if self._tensor is None:
            self._array[slices] = values
        else:
            part = self._tensor[slices]
            part.copy_(torch.from_numpy(np.array(values)).view(part.dtype))

    def memory(self, box: Box) -> memoryview | None:
        """Return the memory of a box within this one, if its elements lie there row by row."""
        if self._tensor is not None:
            return None
        part = self._array[box.within(self.box)]
        return part.reshape(-1).view(np.uint8).data if part.flags.c_contiguous else None

    def place(self) -> tuple[int, tuple[int, ...]]:
        """Return where it lies in memory, and how many bytes lie between neighbours of each dim."""
        return self._array.__array_interface__["data"][0], self._array.strides

    def get(self, box: Box) -> Array:
        """Return the bits of a box within this one, row by row."""
        slices = box.within(self.box)
        if self._tensor is not None:
            return np.array(bits_of(self._tensor[slices].resolve_conj().resolve_neg().cpu()), order="C")
        return np.array(self._array[slices], order="C")


def bits_of(tensor: torch.Tensor) -> Array:
    """Return a view of the bits of a tensor on the CPU, in the format's carrier type."""
    plain = tensor.detach()
    if plain.dtype is not torch.complex128:
        plain = plain.view(_INTEGERS[plain.itemsize])
    array: Array = plain.numpy()
    return array.view(dtype_of(dtype_name(tensor.dtype)).carrier)


def check_apart(name: str, tensor: torch.Tensor) -> None:
    """Raise Mismatch, naming the tensor, if it cannot be filled as several of its elements are one."""
    if overlaps_itself(tensor):
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        is_expanded = any(stride == 0 and size > 1 for stride, size in steps)
        raise Mismatch(
            f"the target of {name!r} {'is expanded' if is_expanded else 'overlaps itself'}: several of its "
            "elements are one in memory, and cannot take their values; give a tensor of its own (clone())"
        )


def number_targets(wanted: Sequence[Wanted], manifest: Manifest) -> list[int]:
    """Return which of the manifest's tensors each wanted box belongs to.

    Raises Mismatch, naming the first ones, for tensors that the checkpoint has not, or has of another kind.
    """
    numbers = {tensor.name: number for number, tensor in enumerate(manifest.tensors)}
    wrong = {}
    for one in wanted:
        number = numbers.get(one.name)
        stored = None if number is None else manifest.tensors[number]
        if stored is None or (stored.dtype, stored.shape) != (one.dtype, one.shape):
            found = "absent" if stored is None else f"{stored.dtype}{list(stored.shape)}"
            wrong[one.name] = f"{one.name}: {found} in the checkpoint, {one.dtype}{list(one.shape)} here"
    if wrong:
        raise mismatch(manifest, list(wrong.values()))
    return [numbers[one.name] for one in wanted]


def mismatch(manifest: Manifest, wrong: Sequence[str]) -> Mismatch:
    """Return the error that says which tensors of a checkpoint are not what the caller has."""
    more = f"; and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
    return Mismatch(
        f"the checkpoint of step {manifest.step} of run {manifest.run!r} is of another model: "
        f"{'; '.join(wrong[:_MAX_NAMED])}{more}. Use the job and settings it was saved with"
    )


def _checked(wanted: Wanted, tensor: torch.Tensor) -> torch.Tensor:
    if dtype_name(tensor.dtype) != wanted.dtype or tuple(tensor.shape) != wanted.box.size:
        raise Mismatch(
            f"the target of {wanted.name!r} is {dtype_name(tensor.dtype)}{list(tensor.shape)}, "
            f"but what is wanted is {wanted.dtype}{list(wanted.box.size)}"
        )
    check_apart(wanted.name, tensor)
    return tensor.detach()


def _array(wanted: Wanted, target: Buffer) -> Array:
    view = memoryview(target)
    kind = dtype_of(wanted.dtype)
    num_bytes = wanted.box.numel * kind.itemsize
    if view.readonly or not view.c_contiguous or view.nbytes != num_bytes:
        kind_of = "read-only" if view.readonly else "contiguous" if view.c_contiguous else "scattered"
        raise Mismatch(
            f"the target of {wanted.name!r} has to be {num_bytes} writable, contiguous bytes, "
            f"not {view.nbytes} {kind_of} ones"
        )
    return np.frombuffer(view.cast("B") if num_bytes else b"", kind.carrier).reshape(wanted.box.size)
