"""What is filled may share memory: it comes back if the checkpoint agrees with that, else it is refused."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from checkpoint import Catalog, Checkpointer, CheckpointError, Mismatch, OnRanks, Options, restore_into
from checkpoint.checkpointer.refilling import plan_refill
from checkpoint.checkpointer.restoring import Found, restore_newest
from checkpoint.checkpointer.world import World
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.source import sources_of
from checkpoint.engine.targets import Wanted
from checkpoint.format.layout import Box
from checkpoint.store.memory import MemoryStore
from tests.property.test_engine_sharded import rank_of, save_all, shard

SMALL = Options(arena_mib=8, kept="in this process")
GRID = torch.arange(16.0).view(4, 4)
State = dict[str, Any]


@pytest.fixture(params=["memory://{}", "{}"])
def url(request, tmp_path) -> str:
    """Give a store, of which files are read in another way than others: straight to where they belong."""
    return str(request.param).format(tmp_path)


def restored(url: str, saved: Any, live: Any) -> None:
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.save(1, saved)
        assert checkpointer.wait()
        checkpointer.restore(live)


def transposed() -> State:
    b = torch.zeros(4, 4)
    return {"a": b, "b": b.t()}


def reshaped() -> State:
    b = torch.zeros(4, 4)
    return {"a": b, "b": b.view(16)}


def rows_in_common() -> State:
    b = torch.zeros(10)
    return {"a": b[:6], "b": b[4:]}


def other_dtype() -> State:
    b = torch.zeros(16)
    return {"a": b, "b": b.view(torch.int32)[3:5]}


def like_with(live: State, value: Callable[[torch.Tensor], torch.Tensor]) -> State:
    """Return values for the names of a state, which do not overlap."""
    return {name: value(tensor) for name, tensor in live.items()}


def counted(tensor: torch.Tensor) -> torch.Tensor:
    return torch.arange(tensor.numel()).to(tensor.dtype).reshape(tensor.shape) + 1


OVERLAPPING = [transposed, reshaped, rows_in_common, other_dtype]


@pytest.mark.parametrize("make", OVERLAPPING)
def test_two_tensors_that_share_memory_cannot_silently_take_two_values(url, make):
    live = make()
    saved = like_with(live, counted)
    saved["b"] += 100
    with pytest.raises(Mismatch, match=r"^a shares memory with b here.*differ there: give each .*clone"):
        restored(url, saved, live)


@pytest.mark.parametrize("make", OVERLAPPING)
def test_two_tensors_that_share_memory_take_what_was_saved_of_them_so(url, make):
    original, live = make(), make()
    original["a"].copy_(counted(original["a"]))
    restored(url, original, live)
    assert torch.equal(live["a"], original["a"]) and torch.equal(live["b"], original["b"])


def test_that_older_steps_agree_with_the_shared_memory_is_no_reason_to_go_back_to_them(tmp_path):
    live = reshaped()
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, like_with(live, torch.ones_like))
        assert checkpointer.wait()
        checkpointer.save(2, {"a": GRID, "b": GRID.view(16) + 1})
        assert checkpointer.wait()
        with pytest.raises(Mismatch, match="a shares memory with b"):
            checkpointer.restore(live)


class Viewed(nn.Module):
    v: torch.Tensor

    def __init__(self, first: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(8.0).view(4, 2) + first)
        self.register_buffer("v", self.w.data[:2])


def test_a_buffer_that_is_a_view_of_a_parameter_comes_back_as_it_was_saved(url):
    live = Viewed(50)
    restored(url, Viewed(1), live)
    assert torch.equal(live.w, Viewed(1).w) and live.v.data_ptr() == live.w.data_ptr()


def test_a_buffer_that_is_a_view_of_a_parameter_is_refused_what_was_saved_of_one_of_its_own(url):
    apart = Viewed(1)
    apart.v = torch.full((2, 2), 7.0)
    with pytest.raises(Mismatch, match="m/w shares memory with m/v here"):
        restored(url, {"m": apart}, {"m": Viewed(50)})


def test_whole_and_parts_that_cover_it_all_come_back_with_not_a_number_among_them(url):
    flat, saved = torch.zeros(12), torch.arange(12.0)
    saved[5] = float("nan")
    live = {"flat": flat, "parts": list(flat.split(3)), "tied": flat}
    restored(url, {"flat": saved, "parts": list(saved.split(3)), "tied": saved}, live)
    assert torch.equal(flat.view(torch.int32), saved.view(torch.int32))


@pytest.mark.parametrize("cut", [lambda b: b.split(2), lambda b: b.split(2, 1), lambda b: [b[::2], b[1::2]]])
def test_parts_of_one_buffer_that_have_nothing_in_common_are_filled_in_place(tmp_path, cut):
    buffer = torch.zeros(4, 4)
    store = MemoryStore("parts")
    save_all(store, 1, lambda _: dict(zip("ab", map(torch.clone, cut(GRID)), strict=True)))
    refill = plan_refill(dict(zip("ab", cut(buffer), strict=True)), Catalog(store).manifest(1), (0, 1))
    restore_into(store, [wanted for one in refill.requests for wanted in one.wanted], step=1)
    assert refill.asides == [] and torch.equal(buffer, GRID)


@pytest.mark.parametrize("strides", [(1, 1), (3, 0), (2, 2)])
def test_a_tensor_that_overlaps_itself_is_refused_before_anything_is_written(tmp_path, strides):
    live = {"a": torch.zeros(2, 2), "b": torch.zeros(20).as_strided((4, 3), strides)}
    with pytest.raises(Mismatch, match=r"'b' (is expanded|overlaps itself): several of its elements are one"):
        restored(f"memory://{tmp_path}", like_with(live, counted), live)
    assert not live["a"].any() and not live["b"].any()


def test_a_target_of_the_engine_that_overlaps_itself_is_refused_by_name():
    store, target = MemoryStore("itself"), torch.zeros(6).as_strided((4, 3), (1, 1))
    save_all(store, 1, lambda _: {"w": torch.ones(4, 3)})
    box = Box.whole((4, 3))
    with pytest.raises(Mismatch, match="'w' overlaps itself"):
        restore_into(store, [Wanted("w", "float32", (4, 3), box, target)], step=1)
    odd = torch.zeros(6).as_strided((2, 2), (2, 3))
    restore_into(store, [Wanted("w", "float32", (4, 3), Box((0, 0), (2, 2)), odd)], step=1)
    assert odd.sum() == 4, "no element of it is two, though its rows interleave"


def sharded(values: torch.Tensor, rank: int) -> tuple[State, torch.Tensor]:
    """Return a tensor that is sharded, one that lies in its memory on this rank, and the latter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    whole = shard(values, init_device_mesh("cpu", (2,)), [Shard(0)])
    part = whole.to_local()[0]
    return {"w": whole, "v": OnRanks(part if rank == 0 else None, part.dtype, tuple(part.shape), (0,))}, part


@pytest.mark.parametrize("row", [0, 3])
def test_a_part_of_a_sharded_tensor_that_is_another_s_memory_takes_only_what_agrees(row):
    store = MemoryStore("sharded")
    save_all(store, 1, lambda _: {"w": GRID, "v": GRID[row].clone()})
    with rank_of(0, 2):
        live, part = sharded(torch.zeros(4, 4), 0)
        refill = plan_refill(live, Catalog(store).manifest(1), (0, 2))
        restore_into(store, [wanted for one in refill.requests for wanted in one.wanted], step=1)
        if row == 0:
            refill.settle()
            assert torch.equal(part, GRID[0])
        else:
            with pytest.raises(Mismatch, match="w shares memory with v here"):
                refill.settle()


def test_a_tensor_and_its_conjugate_are_two_though_they_lie_in_one_memory(url):
    saved, live = torch.arange(4.0) + 1j, torch.zeros(4, dtype=torch.complex64)
    restored(url, {"a": saved, "b": saved.conj()}, {"a": live, "b": live.conj()})
    assert torch.equal(live, saved)
    apart: State = {"a": None, "b": None}
    restored(f"{url}/apart", {"a": saved, "b": saved.conj()}, apart)
    assert torch.equal(apart["a"], saved) and torch.equal(apart["b"], saved.conj())
    with pytest.raises(Mismatch, match="a shares memory with b here"):
        restored(f"{url}/unlike", {"a": saved, "b": saved.clone()}, {"a": live, "b": live.conj()})


class Threads(World):
    """Two ranks that are threads of this process, and meet when they speak."""

    said: ClassVar[dict[int, Any]] = {}
    meeting = Barrier(2, timeout=20)

    def everybody(self, said: Any) -> list[Any]:
        """Return what both say."""
        self.said[self.rank] = said
        self.meeting.wait()
        told = [self.said[rank] for rank in range(2)]
        self.meeting.wait()
        return told


def on_ranks(rank: int) -> State:
    """Return what overlaps on rank 0, and what the other rank has."""
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    held = {"a": (0, first), "b": (0, first.t()), "c": (1, second)}
    return {
        name: OnRanks(tensor if rank == owner else None, torch.float32, (4, 4), (owner,))
        for name, (owner, tensor) in held.items()
    }


@pytest.mark.parametrize("second", [GRID.t(), GRID])
def test_what_does_not_agree_on_one_rank_fails_on_all_and_no_rank_waits(second):
    store = MemoryStore("ranks")
    save_all(store, 1, lambda _: {"a": GRID, "b": second + 0, "c": GRID + 1})

    def restore(rank: int) -> Any:
        world = Threads(rank, 2, ("h0", "h1"), 1)
        live = on_ranks(rank)
        try:
            restore_newest(live, sources_of(store), world, Found([1]), ReadPolicy(), run="run")
        except CheckpointError as error:
            return error
        return live

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(restore, range(2))
    if second is GRID:
        assert isinstance(one, Mismatch) and "a shares memory with b here" in str(one)
        assert "rank 0: Mismatch: a shares memory" in str(other)
    else:
        assert torch.equal(one["a"].tensor, GRID) and torch.equal(other["c"].tensor, GRID + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_tensors_that_share_memory_of_a_device_take_what_agrees_and_no_other(tmp_path):
    b = torch.zeros(4, 4, device="cuda")
    restored(f"memory://{tmp_path}/1", {"a": GRID, "b": GRID.t()}, {"a": b, "b": b.t()})
    assert torch.equal(b.cpu(), GRID)
    with pytest.raises(Mismatch, match="a shares memory with b"):
        restored(f"memory://{tmp_path}/2", {"a": GRID, "b": GRID}, {"a": b, "b": b.t()})
    with pytest.raises(Mismatch, match="'a' overlaps itself"):
        restored(f"memory://{tmp_path}/3", {"a": GRID}, {"a": b.as_strided((4, 4), (1, 2))})
