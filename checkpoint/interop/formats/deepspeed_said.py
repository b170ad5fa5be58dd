"""What a DeepSpeed checkpoint says beside its tensors: counters, schedulers, groups, client state."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.interop.formats.archive import Stored
from checkpoint.interop.formats.deepspeed_parts import stage_of
from checkpoint.interop.formats.inert import MAX_DEPTH, plain
from checkpoint.interop.formats.numbered import listed

_TENSORS = {"module", "frozen_param_fragments", "optimizer"}
_CUT = {"mp_world_size", "checkpoint_parallel_dimensions", "param_shapes"}  # of one tensor-parallel rank
_WITH_MOMENTS = ("adam", "lion", "lamb", "muon")  # in the types of optimizers that DeepSpeed's config names
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


def num_cut(tree: Mapping[str, Any]) -> int | None:
    """Return among how many tensor-parallel ranks the engine had its model cut, if it says so."""
    count = tree.get("mp_world_size")
    return count if type(count) is int and count > 0 else None


def without_cut(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engine says of itself, without what is said of one tensor-parallel rank's part only."""
    return {key: value for key, value in extra.items() if key not in _CUT}


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


def check_stateless(tree: Mapping[str, Any], zero: Mapping[str, Any], where: str) -> str:
    """Tell that files hold no states of the optimizer. Raises Incomplete if they were lost.

    They were if steps are said to be done with an optimizer that keeps moments.
    """
    groups = [group for group in _groups(zero) if isinstance(group, dict)]
    kind = _kind_with_moments(groups, tree.get("ds_config"))
    if kind and _has_stepped(tree, zero):
        raise Incomplete(
            f"{where} has no rank's optimizer states, though steps were done with {kind}, which keeps "
            "moments: they were lost when it was saved, and a run would go on as if from scratch"
        )
    return f"{where} holds no states of the optimizer: whatever goes on from it begins with new ones"


def _has_stepped(tree: Mapping[str, Any], zero: Mapping[str, Any]) -> bool:
    """Tell whether files say that an optimizer did a step; fp16 skips some that the engine counts."""
    skipped = tree.get("skipped_steps")
    done = (step_of(tree) or 0) - (skipped if type(skipped) is int else 0)
    said = [each.get("step") for each in _groups(zero) if isinstance(each, dict)]
    said += [state.get("step") for state in states_by_number(_base(zero)).values() if isinstance(state, dict)]
    return done > 0 or any(isinstance(step, Stored) or _is_positive(step) for step in said)


def _kind_with_moments(groups: Sequence[Mapping[str, Any]], config: Any) -> str:
    """Return which optimizer keeps moments as its groups say, or else the config; empty if none is told."""
    if any("betas" in group for group in groups):
        return "an optimizer that has betas"
    if any(_is_positive(group.get("momentum")) for group in groups):
        return "an optimizer that has momentum"
    said = config.get("optimizer") if isinstance(config, dict) and not groups else None
    kind = str(said.get("type")) if isinstance(said, dict) else ""
    return kind if any(word in kind.lower() for word in _WITH_MOMENTS) else ""


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def states_by_number(base: Any) -> dict[int, Any]:
    """Return an optimizer's states by the number of the group: each group is one flat parameter."""
    if isinstance(base, list):
        return dict(enumerate(base))
    if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
        return {}
    table = base["state"]
    groups = base.get("param_groups")
    if not isinstance(groups, list):
        return dict(table)
    order = [number for group in groups if isinstance(group, dict) for number in group.get("params", ())]
    return {group: table[number] for group, number in enumerate(order) if number in table}


def options_by_number(zero: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the options of each flat parameter: ZeRO-3 has several of each of the optimizer's groups."""
    groups = [group for group in _groups(zero) if isinstance(group, dict)]
    return [group for group in groups for _ in listed_params(group)]


def is_decoupled(options: Mapping[str, Any]) -> bool:
    """Tell whether weights surely do not decay into their moments, as they do with L2 regularisation."""
    return options.get("weight_decay") == 0 or options.get("decoupled_weight_decay") is True


def is_offloaded(tree: Mapping[str, Any]) -> bool:
    """Tell whether an engine kept its optimizer elsewhere: gradients may then lie in memory not cleared."""
    config = tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return not isinstance(zero, dict) or bool(zero.get("offload_optimizer") or zero.get("cpu_offload"))


def listed_params(group: Mapping[str, Any]) -> Sequence[Any]:
    """Return what a group lists as its parameters."""
    params = group.get("params")
    return params if isinstance(params, list | tuple) else ()


def _base(zero: Mapping[str, Any]) -> Any:
    return zero.get("base_optimizer_state", zero.get("optimizer_state_dict"))


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
    groups = zero.get("param_groups")  # in universal folders
    return groups if isinstance(groups, list) else []


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
