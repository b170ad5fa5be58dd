"""Whatever torch has of optimizers, schedulers and scalers comes back, and goes on bit for bit."""

import copy
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR, AveragedModel

from checkpoint.checkpointer import Checkpointer, Options
from checkpoint.engine.likeness import to_plain
from checkpoint.engine.per_rank import PerRank
from checkpoint.errors import Mismatch
from tests.fault.checkpoint_worlds import same_bits

SMALL = Options(arena_mib=8)

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    **{
        name: (lambda parameters, made=made: made(parameters, lr=0.05))  # type: ignore[misc]  # the loop's own
        for name, made in vars(optim).items()
        if isinstance(made, type) and issubclass(made, optim.Optimizer) and made is not optim.Optimizer
    },
    "SGD with momentum": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop, centered": lambda parameters: optim.RMSprop(parameters, lr=0.05, centered=True, momentum=0.5),
    "LBFGS, line search": lambda parameters: optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
    "AdamW, capturable rate": lambda parameters: optim.AdamW(parameters, lr=torch.tensor(0.05)),
}


class Shrink:
    """A factor with a state of its own."""

    def __init__(self) -> None:
        self.power = 0.9

    def __call__(self, epoch: int) -> float:
        return float(self.power**epoch)


def _sequential(optimizer: optim.Optimizer) -> schedules.LRScheduler:
    parts: list[schedules.LRScheduler] = [
        schedules.LinearLR(optimizer, total_iters=2),
        schedules.MultiStepLR(optimizer, [2, 3, 3]),
    ]
    return schedules.SequentialLR(optimizer, parts, [3])


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda one: schedules.LambdaLR(one, lambda epoch: 0.9**epoch),
    "LambdaLR, a callable": lambda one: schedules.LambdaLR(one, Shrink()),
    "MultiplicativeLR": lambda one: schedules.MultiplicativeLR(one, lambda _: 0.9),
    "StepLR": lambda one: schedules.StepLR(one, 2),
    "MultiStepLR": lambda one: schedules.MultiStepLR(one, [1, 4, 4, 6]),
    "ConstantLR": schedules.ConstantLR,
    "LinearLR": schedules.LinearLR,
    "ExponentialLR": lambda one: schedules.ExponentialLR(one, 0.9),
    "PolynomialLR": schedules.PolynomialLR,
    "CosineAnnealingLR": lambda one: schedules.CosineAnnealingLR(one, 10),
    "CosineAnnealingWarmRestarts": lambda one: schedules.CosineAnnealingWarmRestarts(one, 3),
    "CyclicLR": lambda one: schedules.CyclicLR(one, 0.01, 0.1, step_size_up=3),
    "CyclicLR, a callable": lambda one: schedules.CyclicLR(
        one, 0.01, 0.1, 3, scale_fn=cast(Callable[[float], float], Shrink())
    ),
    "OneCycleLR": lambda one: schedules.OneCycleLR(one, 0.1, total_steps=50),
    "ReduceLROnPlateau": lambda one: schedules.ReduceLROnPlateau(one, patience=1),
    "SequentialLR": _sequential,
    "ChainedScheduler": lambda one: schedules.ChainedScheduler(
        [schedules.MultiStepLR(one, [2, 5]), schedules.ExponentialLR(one, 0.9)], one
    ),
    "SWALR": lambda one: SWALR(one, 0.01, anneal_epochs=6),
}


def learner(
    seed: int, made: Callable[[Any], optim.Optimizer], schedule: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = (
        nn.Embedding(7, 4, sparse=True) if made is OPTIMIZERS["SparseAdam"] else nn.Linear(7, 4, bias=False)
    )
    optimizer = made(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    return state if schedule is None else {**state, "schedule": schedule(optimizer)}


def train(state: dict[str, Any], num_steps: int) -> None:
    model, optimizer = state["model"], state["optimizer"]

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        given = torch.arange(7) if isinstance(model, nn.Embedding) else torch.eye(7)
        found: torch.Tensor = (model(given) - 0.5).square().sum()
        found.backward()
        return found

    for _ in range(num_steps):
        optimizer.step(loss)
        if isinstance(state.get("schedule"), schedules.ReduceLROnPlateau):
            state["schedule"].step(1.0)
        elif "schedule" in state:
            state["schedule"].step()


def settled(state: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = to_plain({name: one.state_dict() for name, one in state.items()}, "")
    return copy.deepcopy(kept)


def there_and_back(tmp_path: Any, state: Any, again: Any) -> None:
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        saving = checkpointer.save(1, state)
        assert saving is not None and saving.durable().result(20).step == 1
        checkpointer.restore(again)


def test_every_optimizer_and_schedule_that_torch_has_is_tried_here():
    tried = {name.split(",")[0] for name in SCHEDULES}
    known = {
        name
        for name, made in vars(schedules).items()
        if isinstance(made, type) and issubclass(made, schedules.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= tried and len(OPTIMIZERS) > 14


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path, name):
    state, again = learner(1, OPTIMIZERS[name]), learner(2, OPTIMIZERS[name])
    train(state, 3)
    there_and_back(tmp_path, state, again)
    assert same_bits(settled(again), settled(state))
    train(state, 2)
    train(again, 2)
    assert same_bits(settled(again), settled(state))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of schedules that call each other
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_if_it_had_not_stopped(tmp_path, name):
    sgd = OPTIMIZERS["SGD with momentum"]
    state, again = learner(1, sgd, SCHEDULES[name]), learner(2, sgd, SCHEDULES[name])
    train(state, 3)
    there_and_back(tmp_path, state, again)
    assert same_bits(settled(again), settled(state))
    train(state, 5)
    train(again, 5)
    assert same_bits(settled(again), settled(state))


def test_a_restored_schedule_keeps_its_counter_a_counter(tmp_path):
    sgd, schedule = OPTIMIZERS["SGD"], SCHEDULES["MultiStepLR"]
    state, again = learner(1, sgd, schedule), learner(2, sgd, schedule)
    there_and_back(tmp_path, {"schedule": state["schedule"]}, {"schedule": again["schedule"]})
    assert type(again["schedule"].milestones) is Counter
    assert again["schedule"].milestones == Counter({1: 1, 4: 2, 6: 1})


def test_a_gradient_scaler_and_an_averaged_model_come_back(tmp_path):
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3)
        average = AveragedModel(model)
        average.update_parameters(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 + seed))
        return {"model": model, "average": average, "scaler": scaler}

    state, again = build(1), build(2)
    there_and_back(tmp_path, state, again)
    assert same_bits(settled(again), settled(state)) and again["scaler"].get_scale() == 2.0**9


def test_a_data_loader_s_nested_state_comes_back_to_its_rank(tmp_path):
    class Loader:
        """As torchdata's: nested, with counts, bytes, a generator's tensor and nothing at all."""

        def __init__(self, state: dict[str, Any]) -> None:
            self.state = state

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    told = {
        "_snapshot": {"_main_snapshot": {"_num_workers": 2, "_sampler_iter_yielded": 7, "_base_seed": 2**62}},
        "_worker_snapshots": {
            "worker_0": {"fetcher": None, "rng": torch.get_rng_state(), "raw": b"\x00\xff"}
        },
        "_iterator_finished": False,
    }
    loader, other = Loader(told), Loader({})
    there_and_back(tmp_path, {"loader": PerRank(loader)}, {"loader": PerRank(other)})
    assert same_bits(other.state, told)


class Point(NamedTuple):
    x: int
    y: float


def test_values_come_back_as_the_type_of_what_is_at_their_place(tmp_path):
    state = {
        "seen": Counter("abca"), "order": OrderedDict(b=1, a=2), "point": Point(1, 2.5),
        "lists": defaultdict(list, {3: [1]}), "size": torch.Size([2, 3]), "deep": [{"p": Point(3, 4.0)}],
    }  # fmt: skip
    again = {
        "seen": Counter(), "order": OrderedDict(), "point": Point(0, 0.0),
        "lists": defaultdict(list), "size": torch.Size([]), "deep": [{"p": Point(0, 0.0)}],
    }  # fmt: skip
    there_and_back(tmp_path, state, again)
    assert again == state and [type(one) for one in again.values()] == [type(one) for one in state.values()]
    assert again["lists"]["new"] == [] and type(again["deep"][0]["p"]) is Point  # type: ignore[index]
    bare: dict[str, Any] = dict.fromkeys(state)
    there_and_back(tmp_path / "bare", state, bare)
    assert bare["seen"] == {"a": 2, "b": 1, "c": 1} and type(bare["seen"]) is dict
    assert bare["point"] == (1, 2.5) and type(bare["point"]) is tuple


@pytest.mark.parametrize(("saved", "here"), [("AdamW", "SGD"), ("Adam", "AdamW"), ("RAdam", "Adamax")])
def test_another_optimizer_s_state_is_refused_by_both_names(tmp_path, saved, here):
    state, again = learner(1, OPTIMIZERS[saved]), learner(2, OPTIMIZERS[here])
    train(state, 1)
    with pytest.raises(
        Mismatch, match=f"optimizer: the checkpoint has the state of {saved} and {here} is here"
    ):
        there_and_back(tmp_path, state, again)
    assert again["optimizer"].state_dict()["state"] == {}
