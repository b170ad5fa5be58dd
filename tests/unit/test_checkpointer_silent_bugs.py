"""Bugs of other checkpoint libraries that no shape, count or exit code showed: each would be seen here."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from checkpoint import Checkpointer, Mismatch, Options

SMALL = Options(arena_mib=8)
Training = dict[str, Any]


def training(width: int = 4) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    optimizer = AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "schedule": StepLR(optimizer, 1, 0.5)}


def train(state: Training) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.ones(3, 4)).square().mean().backward()
    state["optimizer"].step()
    state["schedule"].step()


def steps_of(state: Training) -> list[float]:
    return [float(each["step"]) for each in state["optimizer"].state.values()]


def save(url: str, state: Any, step: int = 1) -> None:
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.save(step, state)
        assert checkpointer.wait()


def test_a_cpu_tensor_that_changes_after_save_returned_is_saved_as_it_was(tmp_path):
    """As pytorch#144657 did not: an asynchronous save kept the live memory of CPU tensors."""
    state = training()
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        train(state)
        before = {name: tensor.clone() for name, tensor in state["model"].state_dict().items()}
        checkpointer.save(1, state)
        train(state)  # waits for the capture before it changes anything
        assert checkpointer.wait()
        checkpointer.restore(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state["model"].state_dict().items())


def test_saving_and_restoring_take_no_optimizer_step(tmp_path):
    """As pytorch#164929 did: reading the optimizer's state advanced Adam's step."""
    url, state = f"memory://{tmp_path}", training()
    train(state)
    weights = [parameter.clone() for parameter in state["model"].parameters()]
    save(url, state)
    assert steps_of(state) == [1.0] * 4
    fresh = training()
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.restore(fresh)
    assert steps_of(fresh) == [1.0] * 4
    assert all(map(torch.equal, fresh["model"].parameters(), weights))


def test_an_optimizer_s_state_that_the_checkpoint_lacks_is_an_error(tmp_path):
    """As pytorch#140898 did not: the optimizer's state was silently empty after a load."""
    url, state = f"memory://{tmp_path}", training()
    train(state)
    save(url, {"model": state["model"]})
    with Checkpointer(url, options=SMALL) as checkpointer, pytest.raises(Mismatch, match="optimizer"):
        checkpointer.restore(training())


@pytest.mark.parametrize(
    "other", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))]
)
def test_names_that_only_one_side_has_are_an_error(tmp_path, other):
    """As pytorch#126285 did not: `strict=True` was ignored."""
    url = f"memory://{tmp_path}"
    save(url, {"model": training()["model"]})
    with Checkpointer(url, options=SMALL) as checkpointer, pytest.raises(Mismatch):
        checkpointer.restore({"model": other})


def test_the_initial_learning_rate_comes_back_and_the_schedule_goes_on(tmp_path):
    """As pytorch#140900 did not: `initial_lr` was dropped, and schedules began anew."""
    url, state = f"memory://{tmp_path}", training()
    for _ in range(3):
        train(state)
    save(url, state, 3)
    fresh = training()
    fresh["optimizer"].param_groups[0].update(lr=7.0, initial_lr=7.0)
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.restore(fresh)
    (group,) = fresh["optimizer"].param_groups
    assert (group["lr"], group["initial_lr"]) == (0.1 * 0.5**3, 0.1)
    train(state)
    train(fresh)
    assert fresh["schedule"].get_last_lr() == state["schedule"].get_last_lr()
    assert all(map(torch.equal, fresh["model"].parameters(), state["model"].parameters()))


def test_the_data_cursor_comes_back_with_the_weights(tmp_path):
    """As torchtitan#811 and #409 did not: the loader began elsewhere than the weights."""
    url, state = f"memory://{tmp_path}", training()
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.save(1, state, cursor={"epoch": 2, "sample": 4096})
        assert checkpointer.wait()
        restored = checkpointer.restore(training())
    assert restored is not None and restored.cursor == {"epoch": 2, "sample": 4096}
