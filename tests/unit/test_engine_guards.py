"""What the guards notice for certain, and what a save holds on to."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import LocalHost, Saver, Share, load
from checkpoint.engine.contract import Failed
from checkpoint.engine.guards import AFTER_BYTES, BEFORE_BYTES, LINE_BYTES, Guards
from checkpoint.engine.leaves import describe, signature_of
from checkpoint.engine.structure import plan_structure
from checkpoint.engine.transfer import Transfer
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps

NUM_BYTES = 1 << 20


def watched(weight: torch.Tensor, salt: int):
    (one,) = Guards(structure_of(weight)).watch([weight], salt)
    return one, one.captured(memoryview(bytearray(weight.nbytes)))


def structure_of(*tensors: torch.Tensor):
    named = {f"t{number}": tensor for number, tensor in enumerate(tensors)}
    key = (0, 1, tuple(signature_of(name, tensor) for name, tensor in named.items()))
    return plan_structure(key, [describe(name, tensor, 0, 1) for name, tensor in named.items()])


runs = st.tuples(st.integers(0, 1 << 30), st.floats(0, 1))


@given(runs)
def test_a_run_of_128_kib_that_changes_before_it_is_copied_is_always_noticed(drawn):
    salt, where = drawn
    weight = torch.zeros(NUM_BYTES // 4)
    one, copy = watched(weight, salt)
    size = (BEFORE_BYTES + LINE_BYTES) // 4
    start = int(where * (weight.numel() - size))
    weight.numpy()[start : start + size] = 1
    copy.copy_(one.live)
    assert one.contradiction(copy) == "sampled elements differ from those at the time of the save"


@given(runs)
def test_a_run_of_16_kib_that_changes_after_it_was_copied_is_always_noticed(drawn):
    salt, where = drawn
    weight = torch.zeros(NUM_BYTES // 4)
    one, copy = watched(weight, salt)
    copy.copy_(one.live)
    assert one.contradiction(copy) is None
    size = (AFTER_BYTES + LINE_BYTES) // 4
    start = int(where * (weight.numel() - size))
    weight.numpy()[start : start + size] = 1
    assert one.contradiction(copy) == "sampled elements changed after they were copied"


@pytest.mark.slow
def test_a_single_element_that_is_written_at_every_step_is_found_out_within_the_rotation():
    weight = torch.zeros(NUM_BYTES // 4)
    steps = 2 * AFTER_BYTES // LINE_BYTES
    found = []
    for step in range(steps):
        one, copy = watched(weight, step)
        copy.copy_(one.live)
        weight.numpy()[12345] += 1
        found.append(one.contradiction(copy) is not None)
    assert any(found) and sum(found) <= steps // 32


@pytest.mark.parametrize("value", [float("nan"), -0.0])
def test_what_equals_itself_only_by_its_bits_is_no_contradiction(value):
    weight = torch.full((90_000,), value)
    one, copy = watched(weight, 3)
    copy.copy_(one.live)
    assert one.contradiction(copy) is None
    weight.numpy()[:] = 0.0
    assert one.contradiction(copy) is not None


@pytest.mark.parametrize("shape", [(3_000_000,), (70, 13, 1031), (1_100_000, 2), (3, 1_048_577), (800, 1500)])
def test_chunks_that_lie_side_by_side_are_watched_together_and_each_is_copied_to_its_own_place(shape):
    weights = [torch.randn(shape), torch.randn(800, 1500).t(), torch.randn(shape)]
    structure = structure_of(*weights)
    space = memoryview(bytearray(max(slot.offset + slot.num_bytes for slot in structure.slots)))
    watches = Guards(structure).watch(weights, salt=7)
    for one in watches:
        copy = one.captured(space)
        for _, part in one.chunks():
            copy[part].copy_(one.live[part])
        assert one.contradiction(copy) is None
    assert [number for one in watches for number in one.numbers] == list(range(len(structure.slots)))
    for slot in structure.slots:
        box = tuple(map(slice, slot.box.start, slot.box.stop))
        copied = space[slot.offset : slot.offset + slot.num_bytes]
        assert bytes(copied) == weights[slot.tensor][box].contiguous().numpy().tobytes()
    assert len({one.memory.data_ptr() for one in watches}) == 3


def test_all_chunks_of_a_tensor_are_watched_over_by_one_pass_of_the_training_thread():
    watches = Guards(structure_of(torch.zeros(20 << 20), torch.zeros(5 << 20))).watch(
        [torch.zeros(20 << 20), torch.zeros(5 << 20)], salt=1
    )
    assert [len(one.numbers) for one in watches] == [20, 5]


@given(st.integers(0, 1 << 40))
def test_samples_of_the_next_save_lie_in_the_memory_of_the_one_before(salt):
    weight = torch.zeros(NUM_BYTES)
    guards = Guards(structure_of(weight))
    places = {guards.watch([weight], salt + step)[0].before[0].data_ptr() for step in range(40)}
    assert len(places) == 1


def test_lines_that_are_compared_lie_in_other_columns_of_a_table_as_they_go():
    weight = torch.arange(NUM_BYTES).reshape(-1, BEFORE_BYTES // 4)
    one, _ = watched(weight, 5)
    assert len(one.before[0][:, 0].remainder(weight.shape[1]).unique()) == len(one.before[0])


def test_small_tensors_are_taken_at_once_so_they_may_change_right_after(monkeypatch):
    store = MemoryStore("eager")
    with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        small = torch.zeros(1000)
        for step in range(5):
            saver.save(step, {"small": small}, Share.alone(), {})
            small.data.add_(1)
        assert saver.drain(20) and durable_steps(saver.outcomes()) == [0, 1, 2, 3, 4]
        saver.close()
    assert all((load(store, step).state["small"] == step).all() for step in range(5))


def test_nothing_of_the_state_is_held_on_to_once_it_is_captured():
    with LocalHost(MemoryStore("held"), arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        small, large = torch.zeros(10), torch.zeros(50_000)
        seen = weakref.ref(large)
        captured = saver.save(1, {"small": small, "large": large}, Share.alone(), {})
        captured.result(20)
        assert saver.drain(20)
        del small, large
        gc.collect()
        assert seen() is None
        saver.close()


@pytest.mark.parametrize("numel", [10, 200_000])
@pytest.mark.parametrize("is_inference", [False, True])
def test_saves_in_inference_mode_and_outside_of_it_follow_each_other(numel, is_inference):
    store = MemoryStore("inference")
    with torch.inference_mode(is_inference):
        state = {"weight": torch.ones(numel)}
    with LocalHost(store, arena_bytes=8 * MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step, mode in enumerate([True, False, True]):
            with torch.inference_mode(mode):
                saver.save(step, state, Share.alone(), {})
            assert saver.drain(20)
        assert durable_steps(saver.outcomes()) == [0, 1, 2]
        saver.close()


@pytest.mark.parametrize("after", [0, 2], ids=["freed", "freed and had anew"])
@pytest.mark.parametrize("form", ["run", "elements"])
def test_memory_that_was_given_back_after_the_save_is_not_read_and_the_snapshot_spoiled(
    monkeypatch, form, after
):
    may_copy = threading.Event()
    monkeypatch.setattr(Transfer, "prepare", lambda *_: may_copy.wait(20))
    store = MemoryStore("freed")
    with LocalHost(store, arena_bytes=16 * MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        weight = torch.ones(1000, 1500)
        storage, num_bytes = weight.untyped_storage(), weight.nbytes
        given = weight if form == "run" else weight.t()
        saver.save(1, {"weight": given}, Share.alone(), {})
        storage.resize_(0)  # as FSDP1 does with what it gathered
        if after:
            storage.resize_(after * num_bytes)
        may_copy.set()
        assert saver.drain(20)
        (outcome,) = saver.outcomes()
        assert (
            isinstance(outcome, Failed)
            and "'weight'" in outcome.why
            and "memory was given back" in outcome.why
        )
        saver.close()
    assert store.list("manifests/") == []
