"""What of a job's objects goes with the state, to other members and into checkpoints: exactly, or not at all.

Containers come back as the live object has them, tensors with the dtypes that they had; what has no plain
form is refused before anything is lost.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoint import FormatError, flatten_state
from elastic.errors import JobRejected
from elastic.training.containers import as_one_like
from elastic.training.strides import laid_beside

EXTRA = "_extra_state"
"""The last part of the names under which torch puts what modules' `get_extra_state` returns."""


def check_carried(tree: Mapping[str, Any]) -> None:
    """Raise JobRejected, naming it, if something in a state has no plain form."""
    try:
        flatten_state(tree)
    except FormatError as error:
        raise JobRejected(
            f"the job's state can neither be given to other workers nor saved: {error}"
        ) from None


def check_modules(model: nn.Module) -> None:
    """Raise JobRejected for a module whose extra state could be taken, but not given to another one."""
    for name, module in model.named_modules():
        if has_extra(module) and type(module).set_extra_state is nn.Module.set_extra_state:
            raise JobRejected(
                f"the model's module {name!r} ({type(module).__name__}) has get_extra_state and no "
                "set_extra_state, so that other workers cannot come to its state: give it both, or neither"
            )


def has_extra(module: nn.Module) -> bool:
    """Return whether a module has state beside its tensors."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def take_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's state by its parameters' names, and its groups, live."""
    keys: list[Any] = list(optimizer.state)
    if others := [key for key in keys if id(key) not in names]:
        shown = "a tensor" if isinstance(others[0], Tensor) else repr(others[0])
        raise JobRejected(
            f"the job's optimizer ({type(optimizer).__name__}) keeps state under {shown}, which is no "
            "parameter of the model: keep it in the state of a parameter, or in a parameter group"
        )
    kept = {names[id(each)]: state for each, state in optimizer.state.items()}
    return {"state": kept, "groups": groups_of(optimizer, names)}


def count_entries(optimizer: Optimizer) -> int:
    """Count what an optimizer keeps of its parameters and groups."""
    kept = [each for each in optimizer.state.values() if isinstance(each, dict)]
    return len(optimizer.state) + sum(map(len, kept)) + sum(map(len, optimizer.param_groups))


def groups_of(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, with names for parameters."""
    return [
        {
            key: [names[id(each)] for each in value] if key == "params" else value
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]


def give_optimizer(
    optimizer: Optimizer,
    made: Mapping[str, Any],
    plain: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Give an optimizer the state of another one, whose groups have the same parameters.

    torch gets the `plain` form: it rebuilds containers in its own way, which not every kind bears.
    """
    positions: dict[str, int] = {}
    groups = []
    for live, group in zip(optimizer.param_groups, made["groups"], strict=True):
        indices = [positions.setdefault(name, len(positions)) for name in group["params"]]
        hyper = {key: _beside(live.get(key), value) for key, value in group.items()}
        groups.append({**hyper, "params": indices})
    state = {positions[name]: kept for name, kept in plain["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, kept in made["state"].items():  # torch has cast them to the parameters' dtype
        parameter = parameters[name]
        optimizer.state[parameter] = placed(parameter, optimizer.state[parameter], kept)


def take_schedule(schedule: Any) -> Any:
    """Return a schedule's state, live; None if there is no schedule."""
    return None if schedule is None else schedule.state_dict()


def placed(parameter: Tensor, live: Any, value: Any) -> Any:
    """Return a value of a parameter's state, or all of it: where the live one is, as it has to lie."""
    if isinstance(value, dict):
        inside = live if isinstance(live, Mapping) else {}
        items = {key: placed(parameter, inside.get(key), each) for key, each in value.items()}
        return as_one_like(value, items)
    if isinstance(value, (list, tuple)):
        known = live if isinstance(live, (list, tuple)) and len(live) == len(value) else [None] * len(value)
        return as_one_like(
            value, [placed(parameter, one, each) for one, each in zip(known, value, strict=True)]
        )
    moved = _beside(live, value)
    is_like = isinstance(moved, Tensor) and moved.shape == parameter.shape
    return laid_beside(parameter, moved) if is_like else moved


def _beside(live: Any, value: Any) -> Any:
    both = isinstance(live, Tensor) and isinstance(value, Tensor)
    return value.to(live.device) if both else value
