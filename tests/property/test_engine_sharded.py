"""DTensors of every placement: the ranks write each element exactly once, and the whole tensor comes back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoint import (
    Catalog,
    LocalHost,
    Mismatch,
    OnRanks,
    Saver,
    Share,
    Unsupported,
    load,
    restore_into,
    verify,
)
from checkpoint.checkpointer.refilling import plan_refill
from checkpoint.engine.leaves import spread_of
from checkpoint.engine.per_rank import PerRank, per_rank_values
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    """Be one rank of a world whose other ranks do not exist: nothing that is saved may ask them."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(whole: torch.Tensor, mesh: Any, placements: list[Placement]) -> DTensor:
    """Give a rank its part of a tensor, cut by torch itself."""
    local = whole
    for axis, placement in enumerate(placements):
        if isinstance(placement, (Shard, _StridedShard)):
            pieces = placement._split_tensor(local, mesh.size(axis), with_padding=False, contiguous=True)[0]
            local = pieces[mesh.get_coordinate()[axis]]
    return DTensor.from_local(
        local.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def save_all(store: MemoryStore, size: int, state_of: Any) -> list[Any]:
    """Save one step from every rank of a world, on two hosts; return what each rank's plan writes."""
    hosts = tuple("h0" if rank < (size + 1) // 2 else "h1" for rank in range(size))
    locals_ = {name: LocalHost(store, name, arena_bytes=MIB, tuning=QUICK) for name in dict.fromkeys(hosts)}
    savers, loads = [], []
    for rank in range(size):
        with rank_of(rank, size):
            saver = Saver(locals_[hosts[rank]].session(), "run", RAW)
            saver.save(1, state_of(rank), Share(1, rank, size, hosts), {})
            saver.wait_captured()
            savers.append(saver)
            loads.append(saver._cache.structure.slots)  # type: ignore[union-attr]
    for saver in savers:
        assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
        saver.close()
    for host in locals_.values():
        host.close()
    return loads


def strided(dim: int, split: int) -> _StridedShard:
    return _StridedShard(dim, split_factor=split)


dims = st.integers(0, 1)
placements = st.one_of(
    st.just(Replicate()), st.builds(Shard, dims), st.builds(strided, dims, st.integers(1, 3))
)


@settings(max_examples=25)
@given(
    st.data(),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_every_element_of_a_sharded_tensor_is_written_once_and_comes_back(data, sizes, shape):
    chosen = [data.draw(placements) for _ in sizes]
    size = int(torch.tensor(sizes).prod())
    whole = torch.randint(0, 1 << 30, shape)

    def state_of(rank: int) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", tuple(sizes))
        tensor = shard(whole, mesh, chosen)
        return {
            "w": tensor,
            "tied": tensor.detach(),
            "step": 3,
            "plain": torch.arange(7),
            "own": PerRank({"rank": rank}),
        }

    store = MemoryStore("sharded")
    slots = save_all(store, size, state_of)
    loaded = load(store).state
    assert torch.equal(loaded["w"], whole) and loaded["tied"] is loaded["w"]
    assert [value["rank"] for value in per_rank_values(loaded["own"])] == list(range(size))
    written = sum(slot.box.numel for each in slots for slot in each if slot.tensor == 0)
    assert written == whole.numel() and verify(store).num_bad == 0


@settings(max_examples=10)
@given(st.integers(1, 4), st.data())
def test_a_tensor_that_some_ranks_hold_in_full_is_written_by_one_of_them(size, data):
    ranks = tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    whole = torch.randn(5, 3)

    def state_of(rank: int) -> dict[str, Any]:
        return {"m": OnRanks(whole if rank in ranks else None, whole.dtype, (5, 3), ranks), "step": 3}

    store = MemoryStore("some")
    slots = save_all(store, size, state_of)
    assert next(rank for rank, each in enumerate(slots) if each) in ranks
    assert torch.equal(load(store).state["m"], whole) and verify(store).num_bad == 0


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_what_lies_on_a_part_of_a_larger_mesh_is_replicated_over_the_rest(axis):
    whole = torch.randn(5, 3)

    def state_of(rank: int) -> dict[str, Any]:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        return {"norm": shard(whole, both[axis], [Shard(0)])}

    store = MemoryStore("part")
    slots = save_all(store, 4, state_of)
    assert sum(slot.box.numel for each in slots for slot in each) == whole.numel()
    assert torch.equal(load(store).state["norm"], whole) and verify(store).num_bad == 0


def test_what_lies_on_a_part_of_a_larger_mesh_is_told_without_a_process_group():
    with rank_of(0, 4):
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        norm = shard(torch.randn(5, 3), both["shard"], [Shard(0)])
    assert not torch.distributed.is_initialized()
    assert spread_of("norm", norm).mesh.members == (0, 1, 2, 3)


def test_stages_are_no_replicas_of_each_other_though_their_parts_may_go_by_the_same_names():
    described = set()
    for rank in range(4):
        with rank_of(rank, 4):
            both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "shard"))
            part = shard(torch.randn(4), both["shard"], [Shard(0)])
            described.add(spread_of("layers.0.weight", part).mesh.members)
    assert described == {(0, 1), (2, 3)}, "which no world agrees on"


@pytest.mark.parametrize("rank", range(3))
def test_what_some_ranks_hold_is_filled_where_it_is_and_nothing_elsewhere(rank):
    whole = torch.randn(5, 3)
    store = MemoryStore("held")
    save_all(store, 1, lambda _: {"m": {"a": whole, "b": whole + 1}})
    mine = torch.zeros(5, 3) if rank in (0, 2) else None
    live = {name: OnRanks(mine, torch.float32, (5, 3), (0, 2)) for name in "a"}
    live["b"] = OnRanks(None if rank != 1 else torch.zeros(5, 3), torch.float32, (5, 3), (1,))
    refill = plan_refill({"m": live}, Catalog(store).manifest(1), (rank, 3))
    wanting = [ranks for one in refill.requests for ranks in one.holders.values()]
    assert wanting == [(0, 2), (1,)], "every rank knows who wants what"
    restore_into(store, [wanted for one in refill.requests for wanted in one.wanted], step=1)
    refill.finish()
    held = live["b" if rank == 1 else "a"].tensor
    assert held is not None and torch.equal(held, whole + (rank == 1))
    assert held is mine or rank == 1


def test_a_rank_that_lacks_what_it_should_hold_is_told_so():
    missing = OnRanks(None, torch.float32, (2,), (0,))
    twice = OnRanks(torch.zeros(2), torch.float32, (2,), (0, 0))
    for held, words in ((missing, "rank 0"), (twice, r"ranks \[0, 0\]: name each but once")):
        with LocalHost(MemoryStore("lacks"), arena_bytes=MIB) as host, pytest.raises(Mismatch, match=words):
            Saver(host, "run").save(1, {"m": held}, Share.alone(), {})


def test_replicas_of_shards_share_the_work_evenly():
    whole = {f"w{number}": torch.randn(8, 64) for number in range(40)}

    def state_of(rank: int) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        return {name: shard(tensor, mesh, [Replicate(), Shard(0)]) for name, tensor in whole.items()}

    store = MemoryStore("hsdp")
    loads = [sum(slot.num_bytes for slot in slots) for slots in save_all(store, 4, state_of)]
    assert max(loads) == min(loads)
    assert all(torch.equal(load(store).state[name], tensor) for name, tensor in whole.items())


def test_partial_sums_are_refused_by_name():
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
        host = LocalHost(MemoryStore("partial"), arena_bytes=MIB)
        saver = Saver(host, "run")
        with pytest.raises(Unsupported, match="model/w: a DTensor placed"):
            saver.save(1, {"model": {"w": tensor}}, Share(1, 0, 2, ("local", "local")), {})
        saver.close()
        host.close()
