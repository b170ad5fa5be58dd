"""What a DeepSpeed checkpoint says beside its tensors: counters, schedulers, groups, client state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.deepspeed_parts import stage_of
from checkpoint.interop.formats.inert import MAX_DEPTH, plain
from checkpoint.interop.formats.numbered import listed

_TENSORS = {"module", "frozen_param_fragments", "optimizer"}
_MAX_VALUES = 1 << 22
_ROUND_ROBIN = (
    "Its ds_config has `round_robin_gradients: true`, with which ZeRO's partitions lie in an order that is "
    "not read: save without it"
)
_SHARDS = {
    *("base_optimizer_state", "single_partition_of_fp32_groups", "fp32_flat_groups", "optimizer_state_dict"),
    "param_slice_mappings",
}


def step_of(tree: Mapping[str, Any]) -> int | None:
    """Return how many steps the engine had done."""
    step = tree.get("global_steps", tree.get("iteration"))
    return step if type(step) is int and step >= 0 else None


def hint_of(extra: Mapping[str, Any]) -> str:
    """Return what a run's configuration says of why states may seem to lie under others' names."""
    return f". {_ROUND_ROBIN}" if _is_round_robin(extra) else ""


def check_order(extra: Mapping[str, Any], where: str) -> None:
    """Raise Unsupported if the partitions of ZeRO-1 or 2 lie in another order than the files say."""
    if _is_round_robin(extra):
        raise Unsupported(f"{where} cannot be read. {_ROUND_ROBIN}")


def _is_round_robin(extra: Mapping[str, Any]) -> bool:
    config = extra.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and zero.get("round_robin_gradients") is True


def extra_of(tree: Mapping[str, Any], zero: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what is no tensor, as plain data: the engine's under its own keys, ZeRO's under "zero"."""
    extra = {key: value for key, value in tree.items() if key not in _TENSORS}
    extra = {str(key): _plain(value, where) for key, value in extra.items()}
    extra["zero"] = {str(key): _plain(value, where) for key, value in zero.items() if key not in _SHARDS}
    extra["zero"]["param_groups"] = _plain(_groups(zero), where)
    named = _by_name(extra["zero"]["param_groups"], extra.get("param_shapes"))
    if named:
        extra["optimizer"] = {"param_groups": named}
    return extra


def _by_name(groups: Any, members: Any) -> list[dict[str, Any]]:
    """Return an optimizer's groups with the names of their parameters, if it can be told which are whose."""
    if not isinstance(members, list) or not all(isinstance(each, dict) for each in [*groups, *members]):
        return []
    members = merged(members, groups)
    told = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if len(told) == len(members):
        return [{**group, "params": list(names)} for group, names in zip(told, members, strict=True)]
    if told and all(group == told[0] for group in told):
        return [{**told[0], "params": [name for names in members for name in names]}]
    return []


def merged(parts: Sequence[Mapping[str, Any]], hyper: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the optimizer's groups, of which ZeRO-3 lists parts: each says how many it has."""
    lists = [one.get("params") if isinstance(one, dict) else None for one in hyper]
    counts = [len(each) if isinstance(each, list | tuple) else 0 for each in lists]
    if sum(counts) != len(parts):
        return [dict(part) for part in parts]
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [
        {name: shape for part in parts[end - count : end] for name, shape in part.items()}
        for count, end in zip(counts, ends, strict=True)
    ]


def notes_of(zero: Mapping[str, Any], world: int) -> tuple[str, ...]:
    """Tell how the checkpoint was laid out."""
    return (f"saved by {world} ranks with ZeRO stage {stage_of(zero)}",)


def left_of(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Tell which tensors an engine's client gave it besides: they have no place here."""
    keys = [str(key) for key, value in tree.items() if key not in _TENSORS and _has_tensors(value)]
    if not keys:
        return ()
    return (f"tensors of the client's state are left out: they lie in {listed(sorted(keys))}",)


def left_states(kinds: Collection[str]) -> tuple[str, ...]:
    """Tell which states of the optimizer are none of Adam's."""
    if not kinds:
        return ()
    return (f"states of the optimizer that are none of Adam's are left out: {listed(sorted(kinds))}",)


def _has_tensors(value: Any) -> bool:
    """Tell whether there are tensors in plain data, which were seen to end."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, Stored):
            return True
        if isinstance(each, dict | list | tuple):
            pending += each.values() if isinstance(each, dict) else each
    return False


def _groups(zero: Mapping[str, Any]) -> Any:
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        base = zero.get(key)
        if isinstance(base, dict) and isinstance(base.get("param_groups"), list):
            return base["param_groups"]
    return []


def _plain(value: Any, where: str) -> Any:
    return plain(_Stripped(where).of(value, 0), where)


class _Stripped:
    """Replaces tensors in a tree by texts that tell their shapes; a hostile tree may repeat itself."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._num_values = 0

    def of(self, value: Any, depth: int) -> Any:
        self._num_values += 1
        if depth > MAX_DEPTH or self._num_values > _MAX_VALUES:
            raise Corrupt(f"{self._where} nests or repeats its data beyond all reason")
        match value:
            case Stored():
                return f"a tensor {value.dtype} of shape {value.shape}, left out"
            case dict():
                return {key: self.of(each, depth + 1) for key, each in value.items()}
            case list():
                return [self.of(each, depth + 1) for each in value]
            case tuple():
                return tuple(self.of(each, depth + 1) for each in value)
        return value
