"""Reads pickles without carrying out what they ask for: every class and function is an inert stand-in.

Nothing is ever imported or looked up by the name that a pickle gives. A name on the list of what checkpoints
of the known frameworks hold stands for a record of what it was called with; any other name is refused.
"""

import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.dtypes import DTYPES
from checkpoint.interop.formats.opcodes import end_of_pickle

MAX_PICKLE_BYTES = 1 << 30
MAX_DEPTH = 60  # of nested plain data, less than a skeleton of ours may have
_MAX_VALUES = 1 << 22

# Whatever else these packages define stands for a record of its arguments and state.
_FRAMEWORKS = (
    *("torch", "megatron", "deepspeed", "transformers", "lightning", "pytorch_lightning", "accelerate"),
    *("apex", "transformer_engine", "omegaconf", "nemo", "torchtitan", "peft", "numpy", "datetime", "enum"),
    *("argparse", "pathlib", "types", "dataclasses", "collections", "typing", "uuid", "functools"),
)
_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")  # numpy's codes of those that Python has, too
_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(MemoryError, RecursionError, AssertionError, ImportError),
)


class Sealed(type):
    """The class of stand-ins: a pickle may fill their instances, not change themselves."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it changes the attribute {name!r} of a class")


class Record(metaclass=Sealed):
    """Stands for an object: the name of its class or function, what it was made of, and its state."""

    NAME = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        made = super().__new__(cls)
        made.__dict__["made_of"] = (*args, kwargs) if kwargs else args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    # Some classes are filled like the containers that they extend.
    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", []).append((key, value))

    def append(self, value: Any) -> None:
        """Take an item, as a list would."""
        self.__dict__.setdefault("items", []).append(value)

    def extend(self, values: Any) -> None:
        """Take items, as a list would."""
        self.__dict__.setdefault("items", []).extend(values)

    def field(self, name: str, default: Any = None) -> Any:
        """Return a field of the state, if the state is one of fields."""
        state = self.__dict__.get("state")
        return state.get(name, default) if isinstance(state, dict) else default


class Dict(dict[Any, Any], metaclass=Sealed):
    """Stands for every kind of dict; attributes that it has beside its items are dropped."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(each for each in args if isinstance(each, list | dict)))

    def __setstate__(self, state: Any) -> None:
        pass


class Shut:
    """What a pickle may hold and hand on, but not fill: the same object stands in for other pickles too."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> NoReturn:
        raise pickle.UnpicklingError("it changes what cannot be changed")


@dataclass(frozen=True, slots=True)
class Name(Shut):
    """Stands for an object that is known by its name, such as a dtype or a type of storage."""

    text: str

    __setstate__ = Shut.__setstate__


@dataclass(frozen=True, slots=True)
class Function(Shut):
    """Stands for a function: a pickle may call it, and not get at what Python lets one do with functions."""

    NAME: str
    does: Callable[..., Any]

    __setstate__ = Shut.__setstate__

    def __call__(self, *args: Any) -> Any:
        """Do what is done instead."""
        return self.does(*args)


StandIns = Mapping[str, Callable[..., Any] | Name]


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytearray(data: Any = b"", *rest: Any) -> bytes:
    return _bytes(data, *rest) if isinstance(data, str) else bytes(memoryview(data))


class _OtherScalar(Record):
    NAME = "numpy.scalar"


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """Return a number of numpy's as Python's; another kind stays a record of what it was made of."""
    made_of = dtype.__dict__.get("made_of") if isinstance(dtype, Record) else None
    code = made_of[0] if made_of else None
    if not isinstance(code, str) or not _NUMBER.fullmatch(code) or not isinstance(data, bytes):
        return _OtherScalar(dtype, data)
    state = dtype.__dict__.get("state")
    order = ">" if isinstance(state, tuple) and state[1:2] == (">",) else "<"
    if len(data) != np.dtype(code).itemsize:
        raise pickle.UnpicklingError(f"a number of the type {code} that has {len(data)} bytes")
    return np.frombuffer(data, order + code).item()


# Of Python's own classes only those that cannot be changed themselves, and do nothing but hold.
PLAIN: StandIns = {
    "collections.OrderedDict": Dict,
    "collections.defaultdict": Dict,
    "collections.Counter": Dict,
    "builtins.dict": Dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": list,
    "builtins.frozenset": list,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": _bytearray,
    "builtins.complex": complex,
    "builtins.int": Name("int"),
    "builtins.float": Name("float"),
    "builtins.str": Name("str"),
    "builtins.unicode": Name("str"),
    "builtins.long": Name("int"),
    "builtins.bool": Name("bool"),
    "_codecs.encode": _bytes,
    "torch.Size": tuple,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    **{f"torch.{name}": Name(name) for name in DTYPES},
}


def load_inert(data: bytes, where: str, stand_ins: StandIns, persistent: Callable[[Any], Any]) -> Any:
    """Read one pickle; `stand_ins` by full name come before the general ones. Executes nothing.

    Raises Corrupt for what is no pickle of data, Unsupported for one that names what no checkpoint needs.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise Unsupported(f"{where} is a pickle of {len(data)} bytes, too large to look through")
    if end_of_pickle(data, 0, where) is None:
        raise Corrupt(f"{where} is no pickle, or one that is cut short")
    try:
        return _Unpickler(data, stand_ins, persistent).load()
    except (Corrupt, Unsupported) as error:
        raise type(error)(f"{where}: {error}") from error
    except _ERRORS as error:
        raise Corrupt(
            f"{where} is no sound pickle ({error}): it was damaged, or is no checkpoint's. Get another copy"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, stand_ins: StandIns, persistent: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._stand_ins, self._persistent = stand_ins, persistent
        self._records: dict[str, Sealed] = {}

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        for known in (self._stand_ins, PLAIN):
            if full in known:
                found = known[full]
                return found if isinstance(found, Name | type) else Function(full, found)
        if module.partition(".")[0] not in _FRAMEWORKS:
            raise Unsupported(
                f"it names {full[:200]!r}, which no checkpoint of a known framework holds: it was "
                "refused, and nothing of it was executed. If it is yours, save the state as plain data"
            )
        if full not in self._records:
            self._records[full] = Sealed(name[:100], (Record,), {"NAME": full})
        return self._records[full]


def check_bounded(tree: Any, where: str) -> None:
    """Raise Corrupt for cycles, and for what is nested or repeated beyond all reason."""
    num_values = 0
    pending = [(tree, 0)]
    while pending:
        value, depth = pending.pop()
        num_values += 1
        if depth > MAX_DEPTH or num_values > _MAX_VALUES:
            raise Corrupt(f"{where} nests or repeats its data beyond all reason")
        match value:
            case dict():
                pending += [(item, depth + 1) for item in value.values()]
            case list() | tuple():
                pending += [(item, depth + 1) for item in value]
            case Record():
                pending += [(item, depth + 1) for item in value.__dict__.values()]


def plain(value: Any, where: str) -> Any:
    """Return what was read as plain data: dicts, lists, tuples, numbers, texts, bytes.

    A stand-in becomes a dict that names its class. Raises Corrupt for cycles and for what is nested or
    repeated beyond all reason.
    """
    check_bounded(value, where)
    return _Plain(where).of(value)


class _Plain:
    def __init__(self, where: str) -> None:
        self._where = where

    def of(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str() | bytes() | complex():
                return value
            case dict():
                return {self._key(key): self.of(item) for key, item in value.items()}
            case tuple():
                return tuple(self.of(item) for item in value)
            case list() | set() | frozenset():
                return [self.of(item) for item in value]
            case Name():
                return value.text
            case Record():
                fields = {name: self.of(item) for name, item in value.__dict__.items() if item}
                return {"class": value.NAME, **fields}
        if isinstance(value, Function):
            return value.NAME
        if isinstance(value, type):
            return getattr(value, "NAME", value.__name__)
        raise Unsupported(f"{self._where} holds a {type(value).__name__} where plain data should be")

    def _key(self, key: Any) -> Any:
        return key if isinstance(key, str | int | float | bool | bytes | None) else str(self.of(key))
