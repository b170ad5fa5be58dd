"""A structure is kept between saves, tensors are not: what is replaced, moved, resized is saved as it is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import LocalHost, Saver, Share, load
from checkpoint.engine.tensors import raw_bytes
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps

SIZES = st.sampled_from([1, 7, 32_767, 32_769, 40_000])  # at most, and more than, what is copied at once
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.complex64])
NAMES = st.sampled_from(["a", "b", "c"])


def filled(size: int, dtype: torch.dtype, value: int) -> torch.Tensor:
    return torch.arange(value, value + size).to(dtype)


def contents(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a state holds, bit for bit, whatever shares memory with what."""
    return {
        name: (tensor.dtype, tensor.shape, raw_bytes(tensor.clone()).tobytes())
        for name, tensor in state.items()
    }


def change(state: dict[str, Any], how: str, name: str, fresh: torch.Tensor) -> None:
    """Do to a tensor of a state what training code does between two saves."""
    old = state[name]
    match how:
        case "in place":
            old.add_(1)
        case "replaced":
            state[name] = fresh
        case "its data replaced":
            if old.dtype is fresh.dtype:
                old.data = fresh
            else:
                state[name] = torch.nn.Parameter(fresh, requires_grad=False)
        case "freed, and another put in its memory":
            size, dtype = old.numel(), old.dtype
            state[name] = None
            del old
            state[name] = filled(size, dtype, 1000)
        case "swapped":
            state["a"], state["b"] = state["b"], state["a"]
        case "tied":
            state["c"] = state["a"]
        case "a view":
            state[name] = old[::2]
        case "its storage emptied and filled again":
            size, dtype = old.untyped_storage().size(), old.dtype
            if old.is_contiguous() and old.numel() * old.element_size() == size:
                old.untyped_storage().resize_(0)
                old.untyped_storage().resize_(size)
                old.copy_(filled(old.numel(), dtype, 77))


CHANGES = st.sampled_from(
    [
        "in place",
        "replaced",
        "its data replaced",
        "freed, and another put in its memory",
        "swapped",
        "tied",
        "a view",
        "its storage emptied and filled again",
        "nothing",
    ]
)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.lists(st.tuples(CHANGES, NAMES, SIZES, DTYPES), min_size=1, max_size=6))
def test_what_is_saved_is_what_the_state_holds_now(changes):
    store = MemoryStore("stale")
    state: dict[str, Any] = {name: filled(40_000, torch.float32, number) for number, name in enumerate("abc")}
    copies = []
    with LocalHost(store, arena_bytes=2 * MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        for step, (how, name, size, dtype) in enumerate(changes):
            saver.save(step, state, Share.alone(), {})
            copies.append(contents(state))
            saver.wait_captured()
            change(state, how, name, filled(size, dtype, step))
        saver.save(len(changes), state, Share.alone(), {})
        copies.append(contents(state))
        assert saver.drain(20) and durable_steps(saver.outcomes()) == list(range(len(copies)))
        saver.close()
    for step, copy in enumerate(copies):
        assert contents(load(store, step).state) == copy
