"""Containers that an optimizer makes in its steps come to joiners and out of checkpoints as they were, or are
refused by name.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from checkpoint import Catalog, LocalHost, Mismatch, Saver, open_store
from elastic.control.standing import BLANK
from elastic.errors import JobRejected
from elastic.training.containers import newcomer_of
from elastic.training.trainer import Storage
from tests.joining import PLAN, ChosenJob, finished, in_one_thread, joined, resumed_after_four, trainer_of
from tests.unit.test_training_trainer import trained

__all__ = ["in_one_thread"]


class Tally(NamedTuple):
    """A namedtuple of the optimizer's module."""

    value: float
    seen: Any


class Tagged(dict[str, float]):
    """A dict that needs an argument to be made."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.tag = tag


@dataclass(frozen=True)
class Kept:
    """How an optimizer makes a container, and what it does with it in every step; that returns a factor."""

    make: Callable[[], Any]
    use: Callable[[Any], tuple[Any, float]]


def count(counter: Any) -> tuple[Any, float]:
    counter[f"new {len(counter)}"] += 1
    return counter, 1 / len(counter)


def turn(ordered: Any) -> tuple[Any, float]:
    ordered[f"z{len(ordered)}"] = float(len(ordered))
    ordered.move_to_end("a")
    return ordered, 1 / (1 + next(iter(ordered.values())))


def collect(listed: Any) -> tuple[Any, float]:
    listed[len(listed), "key"].append(Tally(1.0, ()))
    return listed, 1 / sum(each[0].value for each in listed.values())


def replaced(tally: Any) -> tuple[Any, float]:
    tally.seen["steps"] += torch.ones(2)
    return tally._replace(value=tally.value + 1), 1 / tally.value


def inside(outer: Any) -> tuple[Any, float]:
    outer["deep"][0][len(outer["deep"][0])] += 1
    return outer, 1 / len(outer["deep"][0])


KEPT = {
    "Counter": Kept(Counter, count),
    "defaultdict(int)": Kept(lambda: defaultdict(int), count),
    "defaultdict(list)": Kept(lambda: defaultdict(list), collect),
    "OrderedDict": Kept(lambda: OrderedDict(b=1.0, a=0.5), turn),
    "namedtuple": Kept(lambda: Tally(1.0, defaultdict(float)), replaced),
    "Size": Kept(lambda: torch.Size([2, 3]), lambda size: (size, 1 / size.numel())),
    "nested": Kept(lambda: {"deep": (Counter(),)}, inside),
}
LAYOUTS: list[dict[str, Any]] = [{}, {"optimizer_copies": 2}, {"parameter_copies": 2}]


class Keeping(Optimizer):
    """Descent with a factor from containers in its group and, where it may, in each parameter's state."""

    def __init__(
        self, parameters: Any, kept: Mapping[str, Kept], *, after: int = 0, group_only: bool = False
    ) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.kept, self.after, self.group_only, self.num_steps = kept, after, group_only, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        self.num_steps += 1
        factor = self._use(group)
        for parameter in group["params"]:
            if parameter.grad is not None:
                own = 1.0 if self.group_only else self._use(self.state[parameter])
                parameter.add_(parameter.grad, alpha=-group["lr"] * factor * own)

    def _use(self, place: dict[str, Any]) -> float:
        product = 1.0
        for key, kept in self.kept.items() if self.num_steps > self.after else ():
            if key not in place:
                place[key] = kept.make()
            place[key], factor = kept.use(place[key])
            product *= 0.5 + factor
        return product


def job_of(kept: Mapping[str, Kept], **options: Any) -> Any:
    return ChosenJob(make_optimizer=lambda model: Keeping(model.parameters(), kept, **options))


def job_with(make: Callable[[], Any], after: int) -> Any:
    return job_of({"kept": Kept(make, lambda value: (value, 1.0))}, after=after)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_containers_that_come_with_the_first_step_go_along(layout: dict[str, Any], request: Any):
    job, plan = job_of(KEPT, group_only="optimizer_copies" in layout), replace(PLAN, **layout)
    quiet = trainer_of(job, plan)
    trained(quiet)
    resumed = resumed_after_four(job, plan, request.node.name)
    assert {finished(each) for each in (*joined(job, plan), resumed)} == {quiet.weights_sha256()}


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: deque([1]), r"kept is a collections.deque \(Keeping's\)"),
    (lambda: Tagged("a"), r"kept is a .*\.Tagged \(Keeping's\)"),
    (lambda: [Counter(), {"one": Tagged("a")}], r"kept/1/one is a .*\.Tagged"),
    (lambda: defaultdict(lambda: 1), r"kept is a collections.defaultdict\(.*<lambda>\)"),
    (lambda: {frozenset(): 1}, r"kept/\(key\) is a builtins.frozenset"),
]


@pytest.mark.parametrize(
    ("made", "layout", "after"),
    [*[(each, {}, 0) for each in REFUSED], *[(REFUSED[0], layout, 3) for layout in LAYOUTS]],
)
def test_what_nobody_could_come_to_is_refused_in_the_step_that_made_it(
    made: Any, layout: dict[str, Any], after: int
):
    make, words = made
    trainer = trainer_of(job_with(make, after), replace(PLAN, **layout))
    with pytest.raises(JobRejected, match=f"optimizer/state/.*{words}.*make it a tensor"):
        trained(trainer)
    assert trainer.standing.committed == BLANK  # a world that only saves restores what was before


@pytest.mark.parametrize("after", [0, 3])
def test_a_sharded_optimizer_refuses_in_the_step_that_made_it_what_is_no_tensor(after: int):
    trainer = trainer_of(job_with(Counter, after), replace(PLAN, optimizer_copies=2))
    with pytest.raises(JobRejected, match=r"'kept' of .* as a Counter.*optimizer_copies = 0"):
        trained(trainer)
    assert trainer.standing.committed == BLANK


def changing(value: Any) -> tuple[Any, float]:
    return ([*value, 1] if len(value) < 5 else [deque()]), 1.0


def test_what_changes_its_kind_later_is_refused_before_it_is_saved_or_given():
    store, job = open_store("memory://changed"), job_of({"kept": Kept(list, changing)})
    with LocalHost(store, arena_bytes=1 << 24) as host:
        saver = Saver(host, "run")
        trainer = trainer_of(job, replace(PLAN, save_every=4), Storage(saver))
        with pytest.raises(JobRejected, match=r"kept/0 is a collections.deque"):
            trained(trainer)
        saver.close()
    assert Catalog(store).steps() == [4]
    with pytest.raises(JobRejected, match=r"kept/0 is a collections.deque"):
        trainer._learner.tree(8)  # what is handed over


class Ordered(torch.optim.AdamW):
    """An optimizer that keeps the state of each parameter in a dict of another kind."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter, state in self.state.items():
            self.state[parameter] = OrderedDict(state)
        return result


def test_a_parameters_state_in_a_dict_of_another_kind_goes_along_or_is_refused():
    job = ChosenJob(make_optimizer=lambda model: Ordered(model.parameters()))
    _, newcomer = joined(job)
    state = newcomer._learner.optimizer.state  # type: ignore[union-attr]  # the replicated one
    assert {type(each) for each in state.values()} == {OrderedDict}
    with pytest.raises(JobRejected, match=r"in a OrderedDict, not in a dict.*optimizer_copies = 0"):
        trained(trainer_of(job, replace(PLAN, optimizer_copies=2)))


class Remembering(schedules.LRScheduler):
    """A schedule with a container in its state that its later epochs fill with others."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.seen: defaultdict[Any, Any] = defaultdict(Counter)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.seen[self.last_epoch // 3]["epochs"] += 1
        return [0.01 / sum(each["new"] + each["epochs"] for each in self.seen.values())]


def test_containers_that_a_schedule_makes_later_go_along(request: Any):
    job = ChosenJob(make_schedule=Remembering)
    quiet = trainer_of(job)
    trained(quiet)
    resumed = resumed_after_four(job, PLAN, request.node.name)
    assert {finished(each) for each in (*joined(job), resumed)} == {quiet.weights_sha256()}


def test_a_kind_is_looked_up_in_the_modules_of_the_jobs_classes_only_and_is_a_namedtuple():
    newcomer = newcomer_of({"optimizer": {}}, {"optimizer": Keeping([torch.ones(1)], KEPT)})
    path = ("optimizer", "one")
    here = newcomer.make({"optimizer": {"one": (1.0, 2)}}, {path: f"{__name__}:Tally"})
    assert type(here["optimizer"]["one"]) is Tally
    for kind in (
        "os:system",
        f"{__name__}:Tagged",
        f"{__name__}:count",
        "nowhere:Tally",
        "collections:deque",
    ):
        with pytest.raises(Mismatch, match=r"optimizer/one was a .*resume with the job that wrote it"):
            newcomer.make({"optimizer": {"one": (1.0, 2)}}, {path: kind})


def test_a_container_of_a_newcomers_own_keeps_what_it_was_made_with():
    def own() -> Any:
        return {"optimizer": {"tags": Tagged("a"), "lazy": defaultdict(lambda: 7), "size": torch.Size([3])}}

    live, objects = own(), {"optimizer": None}
    giver, taker = newcomer_of(live, objects), newcomer_of(own(), objects)
    live["optimizer"]["tags"]["late"] = 1.0
    live["optimizer"]["lazy"]["seen"] += 1
    live["optimizer"]["size"] = torch.Size([3, 4])
    taken = giver.take(live)
    made = taker.make({"optimizer": taken["optimizer"]}, taken["kinds"])["optimizer"]
    assert (made["tags"].tag, dict(made["tags"])) == ("a", {"late": 1.0})
    assert (made["lazy"]["seen"], made["lazy"]["new"]) == (8, 7)
    assert made["size"] == torch.Size([3, 4])
    assert type(made["size"]) is torch.Size
    older = taker.make({"optimizer": taken["optimizer"]}, None)["optimizer"]
    assert [type(each) for each in older.values()] == [Tagged, defaultdict, torch.Size]
    live["optimizer"]["tags"].tag = "b"
    with pytest.raises(JobRejected, match=r"optimizer/tags is a .*Tagged"):
        giver.take(live)
