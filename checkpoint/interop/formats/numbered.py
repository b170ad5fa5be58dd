"""Optimizer states by number: whose each is, or an error where that would be a guess.

A torch optimizer counts its parameters, group after group. A wrong guess would give one parameter the
moments of another, and nothing that looks at shapes or norms would notice.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.errors import Unsupported

_REMEDY = (
    "save the optimizer with its parameters' names (torch.optim.X(model.named_parameters()) in torch 2.6 or "
    "later), or with torch.distributed.checkpoint"
)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq", "masked_bias")
_NO_PARAMETERS = {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"}


def names_of_numbered(
    state: Mapping[Any, Any], groups: Sequence[Any], model: Mapping[str, Any], leaf: type, where: str
) -> dict[int, str]:
    """Return the names of the parameters that states are numbered for; `model` has its tensors in order.

    They are taken from `param_names`; else parameters come in the model's order, group by group, which is
    believed only where shapes agree and do not leave a choice. Raises Unsupported.
    """
    told = _told(groups)
    if told is not None or not state:
        return told or {}
    ids = [number for group in groups for number in group["params"]]
    if len(set(ids)) != len(ids) or not set(state) <= set(ids):
        raise Unsupported(f"the optimizer of {where} has states of parameters that are in none of its groups")
    candidates = [name for name, item in model.items() if _is_parameter(name, item)]
    candidates = _without_twins(candidates, model)
    if len(candidates) != len(ids):
        raise Unsupported(
            f"the optimizer of {where} numbers {len(ids)} parameters, and the model has {len(candidates)}: "
            f"it cannot be told whose they are; {_REMEDY}"
        )
    shapes = {number: _shape_of(state.get(number), leaf) for number in ids}
    if len([group for group in groups if group["params"]]) == 1:
        return _in_order(ids, candidates, shapes, model, where)
    return _by_shape(groups, candidates, shapes, model, where)


def _told(groups: Sequence[Any]) -> dict[int, str] | None:
    names: dict[int, str] = {}
    for group in groups:
        told = group.get("param_names")
        if not isinstance(told, list) or len(told) != len(group["params"]):
            return None
        names |= dict(zip(group["params"], map(str, told), strict=True))
    return names


def _in_order(
    ids: Sequence[int],
    candidates: Sequence[str],
    shapes: Mapping[int, tuple[int, ...] | None],
    model: Mapping[str, Any],
    where: str,
) -> dict[int, str]:
    for number, name in zip(ids, candidates, strict=True):
        if shapes[number] not in (None, model[name].shape):
            raise Unsupported(
                f"the optimizer of {where} has states of shape {shapes[number]} for its parameter {number}, "
                f"which would be {name!r} of shape {model[name].shape}; {_REMEDY}"
            )
    return dict(zip(ids, candidates, strict=True))


def _by_shape(
    groups: Sequence[Any],
    candidates: Sequence[str],
    shapes: Mapping[int, tuple[int, ...] | None],
    model: Mapping[str, Any],
    where: str,
) -> dict[int, str]:
    """Give each group the parameters of its shapes, in the model's order, if no two groups share a shape."""
    names: dict[int, str] = {}
    owners: dict[Any, int] = {}
    for place, group in enumerate(groups):
        for shape in {shapes[number] for number in group["params"]}:
            if shape is None or owners.setdefault(shape, place) != place:
                raise Unsupported(
                    f"the optimizer of {where} has {len(groups)} groups of numbered parameters, which their "
                    f"shapes do not tell apart ({shape}); {_REMEDY}"
                )
    for shape in owners:
        ids = [number for number, each in shapes.items() if each == shape]
        found = [name for name in candidates if model[name].shape == shape]
        if len(ids) != len(found):
            raise Unsupported(
                f"the optimizer of {where} numbers {len(ids)} parameters of shape {shape}, and the model has "
                f"{len(found)}; {_REMEDY}"
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


def _shape_of(entry: Any, leaf: type[Any]) -> tuple[int, ...] | None:
    """Return the shape of a parameter as its states tell it: those that are not single numbers agree."""
    shapes = {
        item.shape
        for kind, item in (entry.items() if isinstance(entry, dict) else ())
        if isinstance(item, leaf) and kind != "step"
    }
    return shapes.pop() if len(shapes) == 1 else None
