"""Optimizer states by number: whose each is, or an error where that would be a guess.

A torch optimizer counts its parameters, group after group. A wrong guess would give one parameter the
moments of another, and nothing that looks at shapes or norms would notice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import Unsupported

_REMEDY = (
    "save the optimizer with its parameters' names (torch.optim.X(model.named_parameters()) in torch 2.6 or "
    "later), or with torch.distributed.checkpoint"
)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq", "masked_bias")
_NO_PARAMETERS = {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"}

_MAX_NAMED = 6


class Untold(Unsupported):
    """It cannot be told whose the states of an optimizer are."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """The names of numbered parameters.

    `doubts` are sets of names of which nothing but their order tells which is which; `unnumbered` are floats
    of the model that the optimizer cannot have: buffers, or weights that it does not train.
    """

    names: Mapping[int, str]
    doubts: tuple[tuple[str, ...], ...] = ()
    unnumbered: tuple[str, ...] = ()


def names_of_numbered(
    state: Mapping[Any, Any], groups: Sequence[Any], model: Mapping[str, Any], leaf: type, where: str
) -> Numbered:
    """Tell whose numbered states are; `model` has its tensors in order.

    Names are taken from `param_names`; else parameters come in the model's order, group by group, as far as
    shapes agree and leave no choice of which they are. Raises Untold, Unsupported.
    """
    told = _told(groups)
    if told is not None or not state:
        return Numbered(told or {})
    ids = [number for group in groups for number in group["params"]]
    if len(set(ids)) != len(ids) or not set(state) <= set(ids):
        raise Unsupported(f"the optimizer of {where} has states of parameters that are in none of its groups")
    candidates = [name for name, item in model.items() if _is_parameter(name, item)]
    candidates = _without_twins(candidates, model)
    if len(candidates) < len(ids):
        raise Untold(
            f"the optimizer of {where} numbers {len(ids)} parameters, and the model has {len(candidates)}: "
            f"it cannot be told whose they are; {_REMEDY}"
        )
    shapes = {number: _shape_of(state.get(number), leaf) for number in ids}
    asked = _Asked(candidates, shapes, model, where)
    if len([group for group in groups if group["params"]]) != 1:
        names = _by_shape(asked, groups)
    elif len(candidates) == len(ids):
        names = _in_order(asked, ids)
    else:
        names = _some_in_order(asked, ids)
    owners = set(names.values())
    with_states = {names[number] for number in ids if _has_states(state.get(number))}
    shapeless = [names[number] for number in ids if shapes[number] is None]
    return Numbered(
        names,
        _alike(candidates, with_states, shapeless, model),
        tuple(name for name in candidates if name not in owners),
    )


def listed(names: Sequence[str]) -> str:
    """Return some names as a text."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _alike(
    candidates: Sequence[str], with_states: set[str], shapeless: Sequence[str], model: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Return the sets of names whose states could be swapped, and no shape would show it."""
    by_shape: dict[Any, list[str]] = {}
    for name in candidates:
        by_shape.setdefault(model[name].shape, []).append(name)
    sets = [*by_shape.values(), shapeless]
    return tuple(dict.fromkeys(tuple(one) for one in sets if len(one) > 1 and with_states.intersection(one)))


def _told(groups: Sequence[Any]) -> dict[int, str] | None:
    names: dict[int, str] = {}
    for group in groups:
        told = group.get("param_names")
        if not isinstance(told, list) or len(told) != len(group["params"]):
            return None
        names |= dict(zip(group["params"], map(str, told), strict=True))
    return names


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is known: names that could be meant, and the shapes that the states of each number tell."""

    candidates: Sequence[str]
    shapes: Mapping[int, tuple[int, ...] | None]
    model: Mapping[str, Any]
    where: str

    def fits(self, number: int, name: str) -> bool:
        """Whether a numbered parameter can be the one of this name."""
        return self.shapes[number] in (None, self.model[name].shape)


def _in_order(asked: _Asked, ids: Sequence[int]) -> dict[int, str]:
    for number, name in zip(ids, asked.candidates, strict=True):
        if not asked.fits(number, name):
            raise Untold(
                f"the optimizer of {asked.where} has states of shape {asked.shapes[number]} for its "
                f"parameter {number}, which would be {name!r} of shape {asked.model[name].shape}; {_REMEDY}"
            )
    return dict(zip(ids, asked.candidates, strict=True))


def _some_in_order(asked: _Asked, ids: Sequence[int]) -> dict[int, str]:
    """Choose the only names of more that fit in their order; the rest are none of the optimizer's."""
    first = _aligned(asked, ids, asked.candidates)
    last = _aligned(asked, ids[::-1], asked.candidates[::-1])
    if first == last and first is not None:
        return first
    unsure = sorted({*(first or {}).values()} ^ {*(last or {}).values()}, key=list(asked.candidates).index)
    raise Untold(
        f"the optimizer of {asked.where} numbers {len(ids)} parameters, and the model has "
        f"{len(asked.candidates)} that could be meant, buffers among them: "
        + (
            f"shapes do not tell whether it has {listed(unsure)}; {_REMEDY}"
            if first
            else f"in no choice of them do shapes agree; {_REMEDY}"
        )
    )


def _aligned(asked: _Asked, ids: Sequence[int], names: Sequence[str]) -> dict[int, str] | None:
    """Give each number the next name that fits; None if names run out. From both ends, it tells all ways."""
    left, found = iter(names), dict[int, str]()
    for number in ids:
        name = next((name for name in left if asked.fits(number, name)), None)
        if name is None:
            return None
        found[number] = name
    return found


def _by_shape(asked: _Asked, groups: Sequence[Any]) -> dict[int, str]:
    """Give each group the parameters of its shapes, in the model's order, if no two groups share a shape."""
    names: dict[int, str] = {}
    owners: dict[Any, int] = {}
    for place, group in enumerate(groups):
        for shape in {asked.shapes[number] for number in group["params"]}:
            if shape is None or owners.setdefault(shape, place) != place:
                raise Untold(
                    f"the optimizer of {asked.where} has {len(groups)} groups of numbered parameters, which "
                    f"their shapes do not tell apart ({shape}); {_REMEDY}"
                )
    for shape in owners:
        ids = [number for number, each in asked.shapes.items() if each == shape]
        found = [name for name in asked.candidates if asked.model[name].shape == shape]
        if len(ids) != len(found):
            raise Untold(
                f"the optimizer of {asked.where} numbers {len(ids)} parameters of shape {shape}, and the "
                f"model has {len(found)}, {listed(found)}; {_REMEDY}"
            )
        names |= dict(zip(ids, found, strict=True))
    return names


def _is_parameter(name: str, item: Any) -> bool:
    return item.dtype not in _NO_PARAMETERS and name.rpartition(".")[2] not in _BUFFERS


def _without_twins(names: Sequence[str], model: Mapping[str, Any]) -> list[str]:
    """Leave out the second name of tied weights, as a model's parameters() does."""
    seen: set[Any] = set()
    kept = []
    for name in names:
        if model[name] not in seen:
            kept.append(name)
        seen.add(model[name])
    return kept


def _has_states(entry: Any) -> bool:
    return any(item is not None for item in entry.values()) if isinstance(entry, dict) else entry is not None


def _shape_of(entry: Any, leaf: type[Any]) -> tuple[int, ...] | None:
    """Return the shape of a parameter as its states tell it: those that are not single numbers agree."""
    shapes = {
        item.shape
        for kind, item in (entry.items() if isinstance(entry, dict) else ())
        if isinstance(item, leaf) and kind != "step"
    }
    return shapes.pop() if len(shapes) == 1 else None
