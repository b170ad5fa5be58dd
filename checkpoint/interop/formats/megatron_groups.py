"""What Megatron's optimizers say beside their states: options of groups, and what has no place here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from checkpoint.errors import Unsupported
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.inert import plain
from checkpoint.interop.formats.numbered import listed

_OF_RANKS = ("step", "params", "param_names")  # the step is a tensor of each parameter, numbers are a rank's
_KNOWN = {"optimizer", "fp32_from_fp16_params", "param_state", "param_state_sharding_type"}
_STATES = {"exp_avg", "exp_avg_sq", "step"}
_DECAY = "weight_decay"


def options_of(said: Any, where: str) -> list[Any]:
    """Return the options of the groups of an optimizer, or of several optimizers, each kind once."""
    groups: list[Any] = []
    for group in (plain(each, where) for each in _groups(said)):
        groups += [group] if group not in groups else []  # each model rank says them
    return groups


def one_for_all(contents: Contents) -> tuple[dict[str, Any], float]:
    """Return the options of another framework's groups, which are all the same, and the weight decay.

    Of groups that differ in it alone, one may be without, if it has what Megatron does not decay: tensors of
    one dim. Raises Unsupported.
    """
    optimizer = contents.about.extra.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    told = [one for one in groups if isinstance(one, dict)] if isinstance(groups, list) else []
    options = [{key: item for key, item in one.items() if key not in (*_OF_RANKS, _DECAY)} for one in told]
    decays = {one.get(_DECAY, 0.0) for one in told if isinstance(one.get(_DECAY, 0.0), int | float)}
    is_known = bool(told) and all(one == options[0] and "betas" in one for one in options)
    if not is_known or (len(decays) > 1 and not (len(decays) == 2 and _decays_alike(contents, told))):
        raise Unsupported(
            "Megatron's optimizer has the options of its groups (lr, betas, eps, weight_decay), and these "
            "are not known or not the same for all (but for weight decay, which it has for matrices "
            "alone): leave the optimizer out"
        )
    return options[0], float(max(decays, default=0.0))


def _decays_alike(contents: Contents, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether groups decay exactly what Megatron would: what has more than one dim."""
    prefix = "optimizer.exp_avg."
    wanted = {
        one.name.removeprefix(prefix): len(one.shape) > 1
        for one in contents.tensors
        if one.name.startswith(prefix)
    }
    found = {str(name): group.get(_DECAY, 0.0) != 0 for group in groups for name in group.get("params", ())}
    return found == wanted


def left_of_optimizer(said: Any) -> list[str]:
    """Tell what of a legacy file's optimizers is neither Adam's state nor a group's option."""
    found: set[str] = set()
    for one in said if isinstance(said, list) else [said]:
        if isinstance(one, dict) and isinstance(one.get("optimizer"), dict):
            found |= {str(key) for key in one.keys() - _KNOWN}
            table = one["optimizer"].get("state")
            for states in table.values() if isinstance(table, dict) else ():
                found |= {str(key) for key in (states if isinstance(states, dict) else {})} - _STATES
    return [f"of the optimizer, {listed(sorted(found))} is left out"] if found else []


def left_of_ranks(tree: Mapping[str, Any]) -> list[str]:
    """Tell what is each rank's own, and has no meaning for others."""
    found = [key for key in ("rng_state", "rerun_state_machine") if key in tree]
    return [f"random states are each rank's own, and left out: {listed(found)}"] if found else []


def _groups(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        found = node.get("param_groups")
        for group in found if isinstance(found, list) else ():
            if isinstance(group, dict):
                yield {key: value for key, value in group.items() if key not in _OF_RANKS}
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        yield from _groups(inner)
