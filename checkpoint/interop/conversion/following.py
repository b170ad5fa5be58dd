"""Plain data of an optimizer follow its parameters through rules: numbers and groups get new names. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from checkpoint.errors import Misuse
from checkpoint.interop.conversion.names import from_foreign
from checkpoint.interop.conversion.roles import owner_of
from checkpoint.interop.moves import Plan

Names = Mapping[str, Sequence[str]]  # what each parameter becomes: several, if it is taken apart


def follow_inward(extra: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return foreign plain data in which the optimizer speaks of universal parameters.

    The plan's tensors have universal names. What is of a parameter without one keeps its name. Raises Misuse
    for parameters that become one, and of which the optimizer says different things.
    """
    return _follow(extra, lambda: _collected((foreign, universal) for universal, foreign in _pairs(plan)))


def follow_outward(extra: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return plain data in which the optimizer speaks of the foreign parameters of a plan. Raises Misuse."""
    return _follow(extra, lambda: _collected(_pairs(plan)))


def _follow(extra: Mapping[str, Any], names_of: Callable[[], Names]) -> dict[str, Any]:
    optimizer = extra.get("optimizer")
    if not isinstance(optimizer, dict):
        return dict(extra)
    made, names = dict(optimizer), names_of()
    if isinstance(optimizer.get("state"), dict):
        made["state"] = _states(optimizer["state"], names)
    if isinstance(optimizer.get("param_groups"), list):
        made["param_groups"] = _groups(optimizer["param_groups"], names)
    return {**extra, "optimizer": made}


def _pairs(plan: Plan) -> set[tuple[str, str]]:
    found = set()
    for move in plan.moves:
        universal, foreign = plan.tensors[move.target].name, from_foreign(plan.foreign[move.source].name)
        found.add((_parameter(universal), _parameter(foreign)))
    return found


def _parameter(name: str) -> str:
    owned = owner_of(name)
    return owned.parameter if owned else name.removeprefix("model/")


def _collected(pairs: Iterable[tuple[str, str]]) -> Names:
    found: dict[str, list[str]] = {}
    for one, other in sorted(pairs):
        found.setdefault(one, []).append(other)
    return found


def _states(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for owner, entries in state.items():
        for name in names.get(owner, [owner]):
            if isinstance(entries, dict) and isinstance(made.get(name, {}), dict):
                _add(made.setdefault(name, {}), entries, (owner, name))
            else:
                made[name] = entries
    return made


def _add(known: Any, entries: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Add what is told of a parameter to what is told of others that become the same. Raises Misuse."""
    for kind, value in entries.items():
        if repr(known.setdefault(kind, value)) != repr(value):  # a nan is no other than itself
            raise Misuse(
                f"{names[0]!r} becomes a part of {names[1]!r}, and its optimizer's {kind} is {value!r}, "
                f"while that of another part is {known[kind]!r}: one parameter has only one"
            )


def _groups(groups: Sequence[Any], names: Names) -> list[Any]:
    """Return groups by new names; a parameter of parts is in one group, and its parts' options agree."""
    made: list[Any] = []
    owners: dict[str, dict[str, Any]] = {}
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list | tuple):
            made.append(group)
            continue
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        mine = []
        for name in dict.fromkeys(new for old in group["params"] for new in names.get(str(old), [old])):
            if owners.setdefault(name, options) is options:
                mine.append(name)
            elif owners[name] != options:
                raise Misuse(
                    f"the parts of {name!r} are in groups of the optimizer with different options: one "
                    "parameter can be in only one"
                )
        made.append({**options, "params": mine})
    return made
