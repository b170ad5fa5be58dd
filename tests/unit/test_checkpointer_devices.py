"""The same promises wherever the tensors live: on the CPU, and on a CUDA device where there is one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint.checkpointer import Checkpointer, Options, Rng
from checkpoint.engine.contract import Durable

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
WIDTH = 768  # a weight of 2.25 MiB: too large to be copied before `save` returns


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def open_in(tmp_path: Path) -> Callable[[], Checkpointer]:
    options = Options(arena_mib=64, lease_s=1.0, directory=tmp_path / "keeper")
    return lambda: Checkpointer(str(tmp_path / "store"), options=options)


def make(seed: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 8)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return {"model": model, "optimizer": optimizer, "rng": Rng()}


def train(state: dict[str, Any], device: torch.device) -> None:
    state["model"](torch.rand(4, WIDTH, device=device)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def weights(state: dict[str, Any]) -> list[torch.Tensor]:
    return [parameter.detach().cpu().clone() for parameter in state["model"].parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_goes_on_after_a_restore_as_if_it_had_never_stopped(device, open_in):
    state = make(0, device)
    with open_in() as checkpointer:
        for step in (1, 2):
            train(state, device)
            checkpointer.save(step, state)
        assert checkpointer.wait()
    train(state, device)
    again = make(1, device)
    with open_in() as checkpointer:
        restored = checkpointer.restore(again)
    assert restored is not None and restored.step == 2
    train(again, device)
    assert same(weights(again), weights(state))


def test_what_the_next_step_changes_is_not_in_the_checkpoint(device, open_in):
    state = make(0, device)
    with open_in() as checkpointer:
        for step in range(1, 6):
            train(state, device)
            before = weights(state)
            saving = checkpointer.save(step, state)
            train(state, device)  # its optimizer waits for what is not captured yet
            assert isinstance(saving.durable().result(60), Durable)
            again = make(1, device)
            checkpointer.restore(again, step=step)
            assert same(weights(again), before)
            checkpointer.restore(state, step=step)


def test_a_change_of_what_is_being_captured_is_never_saved_silently(device, open_in):
    state = {"large": torch.zeros(16 << 20, device=device)}
    with open_in() as checkpointer:
        for step in range(1, 4):
            saving = checkpointer.save(step, state)
            state["large"].add_(1)  # nobody waited
            if why := saving.durable().exception(60):
                assert "changed" in str(why)
                continue
            again = {"large": torch.empty(16 << 20, device=device)}
            checkpointer.restore(again, step=step)
            assert again["large"].unique().numel() == 1


@needs_cuda
def test_saving_does_not_make_the_training_stream_wait(open_in):
    device = torch.device("cuda")
    state = make(0, device)
    with open_in() as checkpointer:
        train(state, device)
        checkpointer.save(1, state)
        checkpointer.wait_captured()
        torch.cuda.set_sync_debug_mode("error")
        try:
            checkpointer.save(2, state)  # raises if it synchronises
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert checkpointer.wait()
