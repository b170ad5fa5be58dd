"""What is saved is the state at the moment of `save`, to the bit, or nothing."""

import gc
import re
import threading
from typing import Any

import pytest
import torch

from checkpoint import (
    Catalog,
    Failed,
    LocalHost,
    SavePolicy,
    Saver,
    Share,
    Skipped,
    Unsupported,
    fingerprint_tensor,
    load,
    verify,
)
from checkpoint.engine.arena import Sizing
from checkpoint.engine.contract import Content, Handling, Slot, SnapshotPlan, Ticket
from checkpoint.engine.plan import TensorSpec
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps, same_bits, save_alone, small_state

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


LARGE = 40_000  # elements: more than is copied at once


class Held:
    """A host that opens only when it is let: until then nothing is captured."""

    def __init__(self, host: LocalHost) -> None:
        self._host = host
        self.may_open = threading.Event()
        self.may_seal = threading.Event()
        self.may_seal.set()

    def open(self, ticket: Any, plan: Any) -> Any:
        assert self.may_open.wait(10)
        return self._host.open(ticket, plan)

    def ready(self, ticket: Any, chunk_index: int) -> None:
        assert self.may_seal.wait(10)
        self._host.ready(ticket, chunk_index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


@pytest.fixture
def store():
    return MemoryStore("engine")


@pytest.fixture
def host(store):
    with LocalHost(store, arena_bytes=8 * MIB, tuning=QUICK) as local:
        yield local


@pytest.fixture
def saver(host):
    saver = Saver(host, "run", RAW)
    yield saver
    saver.close()


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def test_a_net_that_is_saved_at_every_step_and_changed_right_after_comes_back_bit_for_bit(store, host):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    saver, copies = Saver(host, "run"), {}
    for step in range(1, 8):
        net(torch.randn(8, 16)).square().mean().backward()
        saver.wait_captured()
        optimizer.step()
        optimizer.zero_grad()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        copies[step] = {**state, "model": {k: v.clone() for k, v in net.state_dict().items()}}
        copies[step]["optimizer"] = torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, optimizer.state_dict()
        )
        saver.save(step, state, Share.alone(), {})
    assert saver.drain(20)
    assert durable_steps(saver.outcomes()) == list(range(1, 8))
    saver.close()
    for step, copy in copies.items():
        assert same_bits(load(store, step).state, copy)
    assert verify(store).num_bad == 0


@pytest.mark.parametrize("policy", [RAW, SavePolicy()], ids=["raw", "zstd"])
def test_every_dtype_and_shape_comes_back_bit_for_bit(store, host, policy):
    tensors = {
        f"{dtype}{shape}": random_bits(dtype, shape) for dtype in DTYPES for shape in [(), (0, 3), (5, 3)]
    }
    base = torch.arange(24.0).reshape(4, 6)
    tensors |= {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "large": torch.randn(1200, 1111),
    }
    saver = Saver(host, "run", policy)
    saver.save(1, tensors, Share.alone(), {"note": "all"})
    assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
    saver.close()
    loaded = load(store)
    assert same_bits(loaded.state, {name: tensor.detach().resolve_conj() for name, tensor in tensors.items()})
    assert loaded.manifest.meta == {"note": "all"}
    recorded = {tensor.name: tensor.fingerprint for tensor in loaded.manifest.tensors}
    assert all(fingerprint_tensor(tensor) == recorded[name] for name, tensor in tensors.items())


def test_tied_weights_are_stored_once_and_come_back_tied(store, saver):
    save_alone(saver, 1)
    model = load(store).state["model"]
    assert model["weight"] is model["tied"]


def test_python_values_are_taken_when_save_is_called(store, host):
    held = Held(host)
    saver = Saver(held, "run")
    state: dict[str, Any] = {"list": [1, 2], "w": torch.ones(3)}
    saver.save(1, state, Share.alone(), {})
    state["list"].append(3)
    held.may_open.set()
    assert saver.drain(20)
    saver.close()
    assert load(store).state["list"] == [1, 2]


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("hand", ["in place", ".data", "numpy", "fused AdamW"])
def test_a_tensor_that_changes_during_capture_spoils_the_snapshot_and_never_commits(
    store, host, moment, hand
):
    weight, grad = torch.ones(LARGE), torch.ones(LARGE)
    moments = [torch.zeros(LARGE), torch.zeros(LARGE)]
    held = Held(host)
    saver = Saver(held, "run")
    if moment == "during":
        held.may_open.set()
        held.may_seal.clear()
    saver.save(1, {"a": weight, "b": torch.ones(3)}, Share.alone(), {})
    match hand:
        case "in place":
            weight.add_(1)
        case ".data":
            weight.data.add_(1)
        case "numpy":
            weight.numpy()[:] = 5
        case "fused AdamW":
            torch._fused_adamw_(
                *([weight], [grad], [moments[0]], [moments[1]], [], [torch.tensor(1.0)]),
                lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
    held.may_open.set()
    held.may_seal.set()
    assert saver.drain(20)
    (outcome,) = saver.outcomes()
    assert isinstance(outcome, Failed) and "'a' changed while step 1 was captured" in outcome.why
    assert Catalog(store).latest() is None
    assert durable_steps(save_alone(saver, 2)) == [2]
    saver.close()


def test_an_optimizer_waits_for_the_capture_by_itself(host):
    parameter = torch.nn.Parameter(torch.ones(10))
    parameter.grad = torch.ones(10)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    held = Held(host)
    saver = Saver(held, "run")
    saver.save(1, {"p": parameter}, Share.alone(), {})
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.1)
    assert stepping.is_alive()
    held.may_open.set()
    stepping.join(10)
    assert not stepping.is_alive() and parameter[0] == 0
    assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
    saver.close()


def test_a_closed_saver_leaves_no_hook_behind(host):
    Saver(host, "run").close()
    parameter = torch.nn.Parameter(torch.ones(1))
    torch.optim.SGD([parameter], lr=1.0).step()


def test_a_state_larger_than_the_arena_is_one_clear_outcome_and_the_training_goes_on(host):
    saver = Saver(host, "run")
    saver.save(1, {"w": torch.zeros(3 * MIB)}, Share.alone(), {})
    saver.wait_captured()
    assert saver.drain(20)
    (told,) = saver.outcomes()
    assert isinstance(told, Failed) and re.search(r"12 MiB.*8 MiB.*checkpoint\.arena_mib", told.why)
    assert durable_steps(save_alone(saver, 2)) == [2]
    saver.close()


def test_an_arena_that_may_grow_does_so_under_the_eyes_of_who_reads_it(store):
    with LocalHost(store, arena_bytes=MIB, hold=1, sizing=Sizing("as needed")) as host:
        saver = Saver(host, "run")
        saver.save(1, small_state(1), Share.alone(), {})
        assert saver.drain(20)
        with host.held() as held:
            assert held is not None
            before = bytes(held.memory[:8192])
            saver.save(2, {"w": torch.ones(3 * MIB)}, Share.alone(), {})
            assert saver.drain(20) and durable_steps(saver.outcomes()) == [1, 2]
            assert bytes(held.memory[:8192]) == before
        assert host.pressure().arena_bytes == 36 * MIB and host.pressure().num_waits == 0
        saver.close()
    assert (load(store).state["w"] == 1).all()


def test_a_full_arena_skips_the_checkpoint_when_the_policy_says_so(store, host):
    other = host.open(*_share_of(5 * MIB, step=1, rank=0, size=2))
    assert other is not None
    saver = Saver(host, "run", SavePolicy(when_full="skip"))
    saver.save(2, {"w": torch.zeros(MIB)}, Share(1, 0, 1, ("local",)), {})
    assert saver.drain(20)
    skipped = [outcome for outcome in saver.outcomes() if isinstance(outcome, Skipped)]
    assert [one.step for one in skipped] == [2] and "checkpoint.arena_mib" in skipped[0].why
    saver.close()


def test_a_full_arena_holds_the_fence_until_there_is_room(store, host):
    ticket, plan = _share_of(5 * MIB, step=1, rank=0, size=2)
    assert host.open(ticket, plan) is not None
    saver = Saver(host, "run", SavePolicy(when_full="wait", max_wait_s=20))
    saver.save(2, {"w": torch.zeros(MIB)}, Share(1, 0, 1, ("local",)), {})
    was_short = saver.is_short_of_room
    threading.Timer(0.1, host.spoil, (ticket, "given up")).start()
    assert saver.wait_captured() >= 0.05
    assert (was_short, saver.is_short_of_room) == (True, False)
    assert saver.drain(20) and 2 in durable_steps(saver.outcomes())
    saver.close()


def test_many_saves_of_most_of_the_arena_all_become_durable(store, saver):
    for step in range(1, 9):
        saver.save(step, {"w": torch.full((MIB + MIB // 2,), float(step))}, Share.alone(), {})
    assert saver.drain(30)
    assert durable_steps(saver.outcomes()) == list(range(1, 9))
    assert all(load(store, step).state["w"][-1] == step for step in range(1, 9))


def test_a_tensor_without_plain_memory_is_refused_by_name(saver):
    with pytest.raises(Unsupported, match="model/w"):
        saver.save(1, {"model": {"w": torch.ones(3).to_sparse()}}, Share.alone(), {})
    with pytest.raises(Unsupported, match="meta"):
        saver.save(1, {"w": torch.ones(3, device="meta")}, Share.alone(), {})


def test_a_generation_that_is_used_twice_for_different_states_is_a_loud_conflict(store, host, saver):
    assert durable_steps(save_alone(saver, 3)) == [3]
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as second:
        again = Saver(second, "run", RAW)
        again.save(3, small_state(4), Share.alone(), {})
        assert again.drain(20)
        (outcome,) = again.outcomes()
        again.close()
    assert isinstance(outcome, Failed) and "Conflict" in outcome.why
    assert same_bits(load(store).state, small_state(3))


def test_saving_the_same_state_again_in_a_later_generation_is_success(store, saver):
    assert durable_steps(save_alone(saver, 3, generation=1)) == [3]
    assert durable_steps(save_alone(saver, 3, generation=2)) == [3]
    assert Catalog(store).manifest(3).generation == 1


def _share_of(num_bytes: int, *, step: int, rank: int, size: int) -> Any:
    content = Content((TensorSpec("w", "uint8", (num_bytes,)),), '"w"', "digest")
    slot = Slot(0, Box((0,), (num_bytes,)), 0, num_bytes)
    plan = SnapshotPlan(("local",) * size, content, {}, Handling(Codec.RAW, 1, "wait", 5.0), (slot,))
    return Ticket("run", 0, step, rank), plan


@pytest.mark.slow
def test_a_save_is_not_interrupted_by_the_garbage_collector_and_leaves_it_as_it_was(store, host):
    state = {f"layer.{number}": torch.zeros(64) for number in range(4000)}
    saver = Saver(host, "run", RAW)
    here, runs = threading.get_ident(), []

    def note(phase: str, _: object) -> None:
        if phase == "start" and threading.get_ident() == here:
            runs.append(phase)

    for step in range(3):
        assert saver.drain(20)
        gc.collect()
        runs.clear()
        gc.callbacks.append(note)
        saver.save(step, state, Share.alone(), {})
        gc.callbacks.remove(note)
        assert gc.isenabled()
    assert len(runs) <= 2, "4,000 tensors would make it run ten times and more"
    gc.disable()
    try:
        saver.save(3, state, Share.alone(), {})
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert saver.drain(20)
    saver.close()
