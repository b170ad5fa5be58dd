"""Numbers that an optimizer keeps as plain data: readers find a tensor without dims in the place of each."""

from collections.abc import Iterator, Mapping
from typing import Any

from checkpoint.interop.formats.contract import About

HYPER = "megatron_optimizer"  # in `extra`: what of Megatron's optimizer is no tensor
STEP = "optimizer.step."
_KEY = "step"


def told_numbers(extra: Mapping[str, Any]) -> dict[str, float]:
    """Return the plain numbers of parameters' states, by the names that readers give them as tensors."""
    optimizer = extra.get("optimizer")
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    return {
        f"optimizer.{kind}.{owner}": value
        for owner, entries in (state.items() if isinstance(state, dict) else ())
        for kind, value in (entries.items() if isinstance(entries, dict) else ())
        if type(value) in (int, float)
    }


def step_of_groups(about: About) -> float:
    """Return the step of an optimizer whose states tell none: its groups', else the checkpoint's own."""
    steps = {group[_KEY] for group in _groups(about.extra) if type(group.get(_KEY)) in (int, float)}
    return next(iter(steps)) if len(steps) == 1 else about.step or 0


def _groups(extra: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    optimizer = extra.get("optimizer")
    for groups in (extra.get(HYPER), optimizer.get("param_groups") if isinstance(optimizer, dict) else None):
        yield from (one for one in (groups if isinstance(groups, list) else ()) if isinstance(one, dict))
