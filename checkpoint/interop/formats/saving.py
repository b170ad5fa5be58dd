"""Trees with tensors as files of torch.save, whose elements come later, block by block."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import Unsupported
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.formats.archive import STORAGE_OF
from checkpoint.interop.formats.extents import contiguous
from checkpoint.interop.formats.zipping import ZipStream, length_of

_PROTOCOL = 2  # the one that torch.load(weights_only=True) reads
_FIXED = (("version", b"3\n"), ("byteorder", b"little"))


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """A tensor in a tree whose elements are written later; `number` tells which."""

    number: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """How many bytes its elements take up."""
        size = dtype_of(self.dtype).itemsize
        for n in self.shape:
            size *= n
        return size


class Saving:
    """A tree that is ready to be written: how many bytes it will have is known.

    `modules` say where who loads it finds the classes for which ours stand.
    """

    def __init__(self, tree: Any, modules: Mapping[type[Any], str] | None = None) -> None:
        pickler = _Pickler(tree)
        self._data, self._tensors = pickler.data, pickler.tensors
        for kind, module in (modules or {}).items():
            self._data = _renamed(self._data, kind, module)

    @property
    def num_bytes(self) -> int:
        """How many bytes the file will have."""
        tensors = [(f"data/{key}", one.num_bytes) for key, one in enumerate(self._tensors)]
        fixed = [(name, len(data)) for name, data in _FIXED]
        return length_of([("data.pkl", len(self._data)), *fixed, *tensors])

    def write(self, file: BinaryIO, blocks: Callable[[int], Iterable[memoryview]]) -> None:
        """Write it; `blocks(number)` yields the bytes of a tensor of the tree."""
        stream = ZipStream(file)
        stream.add("data.pkl", len(self._data), [self._data])
        for name, data in _FIXED:
            stream.add(name, len(data), [data])
        for key, one in enumerate(self._tensors):
            stream.add(f"data/{key}", one.num_bytes, blocks(one.number))
        stream.end()


def _renamed(data: bytes, kind: type[Any], module: str) -> bytes:
    """Name a class otherwise: in this protocol a pickle spells it in a line of its own, and once."""
    ours, theirs = (f"c{one}\n{kind.__name__}\n".encode() for one in (kind.__module__, module))
    if data.count(ours) > 1:
        raise Unsupported(f"a text in the state reads like the name of {kind.__name__}: rename it")
    return data.replace(ours, theirs)


class _Pickler(pickle.Pickler):
    """Pickles a tree as torch.save does, and lists its tensors."""

    def __init__(self, tree: Any) -> None:
        buffer = io.BytesIO()
        super().__init__(buffer, protocol=_PROTOCOL)
        self.tensors: list[Later] = []
        self.dump(tree)
        self.data = buffer.getvalue()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Memory):
            return None
        kind = getattr(torch, value.kind) if value.kind != "UntypedStorage" else torch.UntypedStorage
        return "storage", kind, str(value.key), "cpu", value.count

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Later):
            return NotImplemented
        key, numel = len(self.tensors), value.num_bytes // dtype_of(value.dtype).itemsize
        self.tensors.append(value)
        hooks: OrderedDict[str, Any] = OrderedDict()
        view = (0, value.shape, contiguous(value.shape), False, hooks)
        kind = STORAGE_OF.get(value.dtype)
        if kind is None:  # of dtypes that have no storage of their own
            memory = _Memory("UntypedStorage", key, value.num_bytes)
            return _rebuild_tensor_v3, (memory, *view, torch_dtype(value.dtype))
        return _rebuild_tensor_v2, (_Memory(kind, key, numel), *view)


@dataclass(frozen=True, slots=True)
class _Memory:
    kind: str
    key: int
    count: int
