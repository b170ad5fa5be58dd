"""The leaves of a state as a saver sees them: the rank's own tensor of each, and how the whole one is spread.

A leaf is a tensor that every rank holds in full, or some ranks and the others not at all; a DTensor; or a
value that differs from rank to rank.
"""

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch

from checkpoint.engine.on_ranks import OnRanks
from checkpoint.engine.per_rank import PerRank
from checkpoint.engine.plan import Piece, TensorSpec
from checkpoint.engine.tensors import UNSTRIDED, check_copyable, check_plain, dtype_name, identity
from checkpoint.errors import Mismatch, Unsupported
from checkpoint.format.layout import (
    Box,
    Mesh,
    Part,
    Placement,
    Replicate,
    Shard,
    Spread,
    StridedShard,
    holders_of,
    local_shape,
    parts_of,
)
from checkpoint.format.tree import flatten

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Along these axes ranks have modules of their own, which may well go by the same names.
_DIVIDING = {"pp", "pipe", "pipeline", "stage", "ep", "expert", "experts"}
Signature = tuple[Hashable, ...]
Holders = Mapping[Box, tuple[int, ...]]


class Leaves(NamedTuple):
    """A state taken apart: plain data that refers to leaves, their names, and the leaves."""

    skeleton: Any
    names: list[str]
    leaves: list[Any]


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a leaf's structure is. Without a `spread` it is whole on `ranks` (None: on every rank)."""

    spec: TensorSpec
    spread: Spread | None
    device: str
    ranks: tuple[int, ...] | None = None

    def pieces(self, number: int, num_ranks: int) -> list[Piece]:
        """List the boxes that cover tensor number `number`, each with the ranks that can write it."""
        return [Piece(number, box, ranks) for box, ranks in self.holders(num_ranks).items()]

    def holders(self, num_ranks: int) -> Holders:
        """Return which ranks hold each of the boxes that cover the tensor; leaves that are alike share it."""
        if self.spread is None:
            return whole_on(self.spec.shape, self.ranks or everyone(num_ranks))
        return holders_of(self.spread, self.spec.shape)

    def parts(self, rank: int) -> tuple[Part, ...]:
        """List the boxes that a rank holds, each with its place in the rank's own tensor."""
        if self.spread is None:
            whole = Box.whole(self.spec.shape)
            return (Part(whole, whole),) if self.ranks is None or rank in self.ranks else ()
        if rank not in self.spread.mesh.members:
            return ()
        return parts_of(self.spread, self.spec.shape, rank)


def take_apart(state: Any) -> Leaves:
    """Take a nested state apart; a leaf that occurs twice (tied weights) is listed once.

    Raises `FormatError` naming the path of what has no plain form.
    """
    flat = flatten(state, is_leaf=_is_leaf, key=identity_of)
    return Leaves(flat.skeleton, list(flat.leaves), list(flat.leaves.values()))


def identity_of(leaf: Any) -> Hashable:
    """Return what two leaves have in common if they are one (tied weights)."""
    if type(leaf) in _PLAIN:
        return identity(leaf)
    if is_dtensor(leaf):
        with torch.no_grad():
            return identity(leaf.to_local()), leaf.shape, leaf.placements, leaf.device_mesh
    return id(leaf) if isinstance(leaf, (PerRank, OnRanks)) else identity(leaf)


def signature_of(name: str, leaf: Any) -> Signature:
    """Return all that decides how a leaf is saved, but its content and where in memory it lies.

    Raises Unsupported for a tensor without plain memory.
    """
    if type(leaf) in _PLAIN and leaf.layout is torch.strided and not leaf.is_nested:
        if leaf.dtype is UNSTRIDED:
            check_copyable(name, leaf)
        return name, leaf.dtype, leaf.shape, leaf.device
    if isinstance(leaf, PerRank):
        return name, leaf.max_bytes
    if isinstance(leaf, OnRanks):
        return name, leaf.dtype, leaf.shape, leaf.ranks, leaf.own().device
    if is_dtensor(leaf):
        return name, leaf.dtype, leaf.shape, leaf.placements, leaf.device_mesh
    check_plain(name, leaf)
    return name, leaf.dtype, leaf.shape, leaf.device


def own_tensors(names: Sequence[str], leaves: Sequence[Any]) -> list[torch.Tensor]:
    """Return the rank's own tensors of leaves: theirs is the memory that is saved."""
    with torch.no_grad():  # else a DTensor would hand out a view of its local tensor, for autograd
        return [
            leaf if type(leaf) in _PLAIN else _own_tensor(name, leaf)
            for name, leaf in zip(names, leaves, strict=True)
        ]


def describe(name: str, leaf: Any, rank: int, size: int) -> Leaf:
    """Describe a leaf for a rank of a world of `size`.

    Raises Unsupported for what cannot be saved, Mismatch if a DTensor does not lie as its mesh says.
    """
    if isinstance(leaf, PerRank):
        spec = TensorSpec(name, "uint8", (size, leaf.max_bytes))
        return Leaf(spec, Spread(Mesh((("rank", size),)), (Shard(0),)), "cpu")
    if isinstance(leaf, OnRanks):
        _check_on_ranks(name, leaf, rank, size)
        spec = TensorSpec(name, dtype_name(leaf.dtype), leaf.shape)
        return Leaf(spec, None, str(leaf.own().device), leaf.ranks)
    if not is_dtensor(leaf):
        check_plain(name, leaf)
    spec = TensorSpec(name, dtype_name(leaf.dtype), tuple(leaf.shape))
    if not is_dtensor(leaf):
        return Leaf(spec, None, str(leaf.device))
    with torch.no_grad():
        local = leaf.to_local()
    check_plain(name, local)
    described = Leaf(spec, spread_of(name, leaf), str(local.device))
    _check_local(described, tuple(local.shape), rank, size)
    return described


def spread_of(name: str, leaf: Any) -> Spread:
    """Return how a DTensor lies on its mesh, by arithmetic alone. Raises Unsupported for partial sums.

    On a part of a larger mesh (the norms of a model that is tensor parallel and sharded) it is replicated
    over the other axes, so that every rank of the larger mesh says the same of it.
    """
    mesh = leaf.device_mesh
    wide = _widened(mesh)
    # Of several equal slices of a mesh a rank has its own; the process group that tells it may be gone.
    rank = 0 if wide is mesh._get_root_mesh() else mesh.get_rank()
    try:
        return _spread(mesh, wide, rank, leaf.placements, leaf.dim())
    except Unsupported as error:
        raise Unsupported(f"{name}: {error}") from None


@lru_cache(maxsize=64)
def _spread(mesh: Any, wide: Any, rank: int, placements: tuple[Any, ...], num_dims: int) -> Spread:
    """Return how all leaves lie that lie so."""
    known = {axis: _placement(one, num_dims) for axis, one in zip(_axes_of(mesh), placements, strict=True)}
    ranks = _ranks_of(wide, rank)
    return Spread(ranks, tuple(known.get(axis, Replicate()) for axis in _axes_of(wide)))


def _axes_of(mesh: Any) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(f"axis{number}" for number in range(mesh.ndim))


@lru_cache(maxsize=8)
def _ranks_of(mesh: Any, rank: int) -> Mesh:  # noqa: ARG001 -- tells slices apart
    """Return a mesh as plain numbers: torch makes the tensor of its ranks anew each time it is asked."""
    return Mesh(tuple(zip(_axes_of(mesh), mesh.shape, strict=True)), tuple(mesh.mesh.flatten().tolist()))


def _widened(mesh: Any) -> Any:
    """Return the mesh that a mesh was sliced from, if its ranks hold replicas along the axes left out."""
    root = mesh._get_root_mesh()
    names, all_names = _axes_of(mesh), _axes_of(root)
    is_slice = names == tuple(axis for axis in all_names if axis in names)
    return root if is_slice and not _DIVIDING & (set(all_names) - set(names)) else mesh


def is_dtensor(leaf: object) -> TypeGuard[Any]:
    """Whether a leaf is a DTensor; where nobody imported torch's module for them, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


def _own_tensor(name: str, leaf: Any) -> torch.Tensor:
    if isinstance(leaf, PerRank):
        return leaf.row(name)
    if isinstance(leaf, OnRanks):
        return leaf.own()
    own: torch.Tensor = leaf.to_local() if is_dtensor(leaf) else leaf
    return own


def _placement(placement: Any, num_dims: int) -> Placement:
    kinds = sys.modules["torch.distributed.tensor.placement_types"]
    if isinstance(placement, kinds.Replicate):
        return Replicate()
    if isinstance(placement, kinds._StridedShard):
        return StridedShard(placement.dim % num_dims, placement.split_factor)
    if isinstance(placement, kinds.Shard):
        return Shard(placement.dim % num_dims)
    raise Unsupported(
        f"a DTensor placed {placement} holds no values of its own to save: "
        "redistribute it to Replicate() or Shard() first"
    )


def _check_local(leaf: Leaf, found: tuple[int, ...], rank: int, size: int) -> None:
    spread, name = leaf.spread, leaf.spec.name
    if spread is None or rank not in spread.mesh.members:
        return
    if max(spread.mesh.members) >= size:
        raise Mismatch(f"{name}: its mesh has rank {max(spread.mesh.members)}, the world has {size} ranks")
    expected = local_shape(spread, leaf.spec.shape, rank)
    if expected != found:
        raise Mismatch(
            f"{name}: this rank holds {list(found)} of {list(leaf.spec.shape)}, and by its placements "
            f"{spread.placements} it should hold {list(expected or ())}: this torch shards in another way"
        )


def _check_on_ranks(name: str, leaf: OnRanks, rank: int, size: int) -> None:
    if not leaf.ranks or not 0 <= min(leaf.ranks) <= max(leaf.ranks) < size:
        raise Mismatch(f"{name}: it is held by ranks {list(leaf.ranks)}, in a world of {size} ranks")
    if len(set(leaf.ranks)) < len(leaf.ranks):
        raise Mismatch(f"{name}: it is held by ranks {list(leaf.ranks)}: name each but once")
    if (rank in leaf.ranks) != (leaf.tensor is not None):
        raise Mismatch(f"{name}: ranks {list(leaf.ranks)} hold it; rank {rank} gave the opposite")
    if leaf.tensor is not None:
        check_plain(name, leaf.tensor)
        if (leaf.tensor.dtype, tuple(leaf.tensor.shape)) != (leaf.dtype, leaf.shape):
            raise Mismatch(
                f"{name}: this rank holds {leaf.tensor.dtype}{list(leaf.tensor.shape)}, "
                f"and said {leaf.dtype}{list(leaf.shape)}"
            )


def _is_leaf(value: object) -> TypeGuard[Any]:
    return isinstance(value, (torch.Tensor, PerRank, OnRanks))


@lru_cache(maxsize=8)
def everyone(num_ranks: int) -> tuple[int, ...]:
    """Return all ranks of a world."""
    return tuple(range(num_ranks))


@lru_cache(maxsize=256)
def whole_on(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Holders:
    """Return the holders of a tensor that some ranks hold in full."""
    return MappingProxyType({Box.whole(shape): ranks})
