"""Accounts: what of global tensors foreign ones hold, share by share: all that a proof has to know. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.moves import Foreign


@dataclass(frozen=True, slots=True)
class Share:
    """A box of a foreign tensor, and where it begins in a global one.

    Dim d of the box runs along dim `dims[d]` of the global tensor, or along none, if it only counts tensors.
    `copy` says of a second copy what it belongs to; together its shares are the tensor once more.
    """

    source: int
    box: Box
    name: str
    start: tuple[int, ...]
    dims: tuple[int | None, ...]
    copy: str = ""
    is_mean: bool = False

    def place(self, part: Box) -> Box:
        """Return where a part of the box lies in the global tensor."""
        start, size = list(self.start), [1] * len(self.start)
        for dim, there in enumerate(self.dims):
            if there is not None:
                start[there] += part.start[dim] - self.box.start[dim]
                size[there] = part.size[dim]
        return Box(tuple(start), tuple(size))

    @property
    def order(self) -> list[int]:
        """The foreign dims in the order of the global ones."""
        there = [-1 if dim is None else dim for dim in self.dims]
        return sorted(range(len(there)), key=there.__getitem__)


@dataclass(frozen=True, slots=True)
class Padded:
    """A box of a foreign tensor beyond the end of a global one: so many of its rows, from `first` on."""

    source: int
    box: Box
    name: str
    first: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Account:
    """All that foreign tensors hold of global ones: each of these with type and shape, by name."""

    tensors: Mapping[str, TensorSpec]
    shares: tuple[Share, ...]
    padding: tuple[Padded, ...] = ()

    def only(self, names: set[str]) -> "Account":
        """Return what is told of some tensors."""
        return Account(
            {name: spec for name, spec in self.tensors.items() if name in names},
            tuple(one for one in self.shares if one.name in names),
            tuple(one for one in self.padding if one.name in names),
        )

    def renamed(self, rename: Callable[[str], str]) -> "Account":
        """Return the account with other names of the global tensors."""
        return Account(
            {rename(name): replace(spec, name=rename(name)) for name, spec in self.tensors.items()},
            tuple(replace(one, name=rename(one.name)) for one in self.shares),
            tuple(replace(one, name=rename(one.name)) for one in self.padding),
        )

    def tied(self, ties: Mapping[str, str]) -> "Account":
        """Return the account if what has another name of a tensor is a copy of it. Raises Mismatch."""
        known = {other: name for other, name in ties.items() if other in self.tensors}
        for other, name in known.items():
            one, two = self.tensors[other], self.tensors[name]
            if (one.dtype, one.shape) != (two.dtype, two.shape):
                raise Mismatch(f"{other!r} cannot be {name!r}: they differ in type or shape")
        return Account(
            {name: spec for name, spec in self.tensors.items() if name not in known},
            tuple(
                replace(one, name=known[one.name], copy=f"{one.name} {one.copy}")
                if one.name in known
                else one
                for one in self.shares
            ),
            self.padding,
        )


def account_as_named(foreign: Mapping[int, Foreign], names: Mapping[int, str]) -> Account:
    """Tell of foreign tensors, by number, that are global ones of other names."""
    specs = {
        names[number]: TensorSpec(names[number], one.dtype, one.shape) for number, one in foreign.items()
    }
    if len(specs) < len(foreign):
        raise Mismatch("two foreign tensors would be one global one")
    shares = tuple(whole_share(number, one, names[number]) for number, one in foreign.items())
    return Account(specs, shares)


def whole_share(number: int, one: Foreign, name: str) -> Share:
    """Return the share of a foreign tensor that is a whole global one."""
    return Share(number, Box.whole(one.shape), name, (0,) * len(one.shape), tuple(range(len(one.shape))))
