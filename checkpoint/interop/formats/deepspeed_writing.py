"""Writes DeepSpeed's universal checkpoints, which its engines load under any ZeRO stage and world."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from checkpoint.engine.pipeline import fan_out
from checkpoint.errors import Incomplete, Unsupported
from checkpoint.format.box import Box, split_box
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import Contents, is_weight
from checkpoint.interop.formats.deepspeed_said import merged
from checkpoint.interop.formats.deepspeed_universal import STATES
from checkpoint.interop.formats.rounding import ROUNDED, widen_bits
from checkpoint.interop.formats.saving import Later, Saving
from checkpoint.interop.formats.streams import block_bytes, blocks_of, check_global
from checkpoint.interop.formats.tiles import as_bits
from checkpoint.interop.formats.told import STEP, told_numbers

_STATE = re.compile(r"optimizer\.(master|exp_avg|exp_avg_sq|step)\.(.+)")
_ANY_STATE = re.compile(r"optimizer\.([^.]+)\..+")
_MOMENTS = {"exp_avg", "exp_avg_sq"}
_VERSION = "0.19.8"  # of the DeepSpeed that these files were compared with
_NOT_OURS = {"zero", "param_shapes", "optimizer", "containers", "files", "module"}


@dataclass(slots=True)
class Parts:
    """The tensors to write, by what they are; all by their number."""

    states: dict[str, dict[str, int]] = field(default_factory=dict)  # by parameter
    weights: dict[str, int] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)  # of parameters that tell theirs as plain data


def write_deepspeed_universal(draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a universal checkpoint: `latest_universal` names its folder, and is written last.

    Raises Incomplete naming a parameter that lacks a state that others have; Unsupported.
    """
    check_global(contents.tensors, "deepspeed-universal")
    parts = parts_of(contents)
    tag = f"global_step{contents.about.step or 0}_universal"
    plainly = _plainly(contents, budget_bytes)
    module = {name: later_of(contents, number) for name, number in parts.weights.items()}
    empty = {name: Later(-1, "float32", (0,)) for name in module}
    engine = engine_of(contents, parts)
    # The largest file first, so that no thread is left alone with it.
    works: list[Callable[[], None]] = [
        partial(_save, draft, f"{tag}/mp_rank_00_model_states.pt", {**engine, "module": module}, plainly),
        *_parameters(draft, f"{tag}/zero", (contents, parts), budget_bytes),
        partial(_save, draft, f"{tag}/zero/optimizer_state.pt", *_common(contents, parts, plainly)),
        partial(
            _save,
            draft,
            f"{tag}/zero_pp_rank_0_mp_rank_00_model_states.pt",
            {**engine, "module": empty},
            _nothing,
        ),
    ]
    for _ in fan_out(lambda work: work(), works, draft.num_threads):
        pass
    with draft.writing("latest_universal") as file:
        file.write(tag.encode())


def _parameters(
    draft: Draft, folder: str, what: tuple[Contents, Parts], budget_bytes: int
) -> Iterator[Callable[[], None]]:
    """Yield what writes each parameter's files."""
    contents, parts = what
    plainly = _plainly(contents, budget_bytes)
    for name, states in parts.states.items():
        if name in parts.steps:
            yield partial(_save, draft, f"{folder}/{name}/step.pt", *_as_tensor(parts.steps[name]))
        for state, number in states.items():
            if state == "step":
                yield partial(_save, draft, f"{folder}/{name}/step.pt", later_of(contents, number), plainly)
            else:
                path = f"{folder}/{name}/{STATES[state]}.pt"
                yield partial(_save_wide, draft, path, (contents, number), budget_bytes)
    for name, number in parts.weights.items():
        is_float = contents.tensors[number].dtype in ROUNDED
        if "master" not in parts.states.get(name, {}) and is_float:
            yield partial(_save_wide, draft, f"{folder}/{name}/fp32.pt", (contents, number), budget_bytes)


def parts_of(contents: Contents) -> Parts:
    """Sort tensors by what they are. Raises Incomplete naming a parameter that lacks a state, Unsupported."""
    _check_adam(contents)
    parts = Parts()
    for number, tensor in enumerate(contents.tensors):
        found = _STATE.fullmatch(tensor.name)
        if found:
            parts.states.setdefault(found[2], {})[found[1]] = number
        elif is_weight(tensor.name):
            parts.weights[tensor.name] = number
        else:
            raise Unsupported(
                f"DeepSpeed's universal checkpoints have no place for {tensor.name!r}: leave it out"
            )
    for name in [*parts.states, *parts.weights]:
        if {"/", "\0"} & set(name) or name in ("", ".", ".."):
            raise Unsupported(
                f"the parameter {name!r} cannot go to DeepSpeed's folders: that is no name that a folder can "
                "have. Choose another --format, or rename it"
            )
    told = told_numbers(contents.about.extra)
    for name, states in parts.states.items():
        if STEP + name in told and "step" not in states:
            parts.steps[name] = told[STEP + name]
    kinds = {kind for states in parts.states.values() for kind in states}
    kinds |= {"step"} if parts.steps else set()
    for name, states in parts.states.items():
        there = states.keys() | ({"step"} if name in parts.steps else set())
        missing = sorted((kinds | {"master"}) - there)
        if missing and not (missing == ["master"] and name in parts.weights):
            raise Incomplete(f"the parameter {name!r} lacks {missing}, and a universal checkpoint needs it")
    return parts


def _check_adam(contents: Contents) -> None:
    """See that an optimizer keeps what Adam does, or nothing. Raises Unsupported."""
    kinds = {found[1] for one in contents.tensors if (found := _ANY_STATE.fullmatch(one.name))}
    moments = kinds - {"master", "step"}
    if moments not in (set(), _MOMENTS):
        raise Unsupported(
            "DeepSpeed's formats hold the states of Adam only (exp_avg, exp_avg_sq, step), and this "
            f"optimizer has {', '.join(sorted(kinds - {'master'}))}: choose another --format (torch, dcp), "
            "or leave it out (--only 'model/*')"
        )


Blocks = Callable[[int], Iterable[memoryview]]


def _save(draft: Draft, path: str, tree: Any, blocks: Blocks) -> None:
    if path not in draft.kept:
        with draft.writing(path) as file:
            Saving(tree).write(file, blocks)


def _save_wide(draft: Draft, path: str, what: tuple[Contents, int], budget_bytes: int) -> None:
    """Write a tensor as fp32, in the dict that DeepSpeed's converter makes."""
    contents, number = what
    tensor = contents.tensors[number]
    if tensor.dtype not in ROUNDED:
        raise Unsupported(f"{tensor} is {tensor.dtype}; DeepSpeed keeps fp32 parameters and moments")
    tree = {"cat_dim": 0, "param": Later(number, "float32", tensor.shape)}

    def blocks(_: int) -> Iterator[memoryview]:
        for box in split_box(Box.whole(tensor.shape), 4, block_bytes(budget_bytes)):
            bits = widen_bits(contents.read(number, box), tensor.dtype)
            yield memoryview(bits.reshape(-1).view("u1").data)

    _save(draft, path, tree, blocks)


def _plainly(contents: Contents, budget_bytes: int) -> Blocks:
    return lambda number: blocks_of(contents, number, budget_bytes)


def _nothing(_: int) -> list[memoryview]:
    return []


def _as_tensor(step: float) -> tuple[Later, Blocks]:
    """Return a step that was a plain number as a tensor, and its bytes.

    Engines take what is there as it is, and torch's Adam counts on in a tensor only: a number would stay the
    same for ever, without a word.
    """
    tensor, bits = as_bits("step", step)
    return Later(0, tensor.dtype, ()), lambda _: [memoryview(bits.reshape(-1).view("u1").data)]


def later_of(contents: Contents, number: int) -> Later:
    """Return a tensor of the contents as one to write."""
    tensor = contents.tensors[number]
    return Later(number, tensor.dtype, tensor.shape)


def _common(contents: Contents, parts: Parts, plainly: Blocks) -> tuple[dict[str, Any], Blocks]:
    """Return what DeepSpeed keeps once for all parameters; ZeRO-3 takes the step from here."""
    zero = contents.about.extra.get("zero")
    said: Mapping[str, Any] = zero if isinstance(zero, dict) else {}
    groups = hyper_of(contents)
    steps = [states["step"] for states in parts.states.values() if "step" in states]
    step, blocks = (later_of(contents, steps[0]), plainly) if steps else (None, plainly)
    if not steps and parts.steps:
        step, blocks = _as_tensor(next(iter(parts.steps.values())))
    tree = {
        "zero_stage": 1,
        "clip_grad": said.get("clip_grad", 0.0),
        "dynamic_loss_scale": said.get("dynamic_loss_scale", False),
        "overflow": False,
        "ds_version": said.get("ds_version", _VERSION),
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {} if step is None else {0: {"step": step}},
            "param_groups": groups,
        },
    }
    return tree, blocks


def hyper_of(contents: Contents) -> list[dict[str, Any]]:
    """Return the options of each group of the optimizer."""
    zero = contents.about.extra.get("zero")
    said = zero.get("param_groups") if isinstance(zero, dict) else None
    if isinstance(said, list) and said and all(isinstance(group, dict) for group in said):
        return [dict(group) for group in said]
    return [{**group, "params": [number]} for number, group in enumerate(_named(contents))] or [{}]


def _named(contents: Contents) -> list[dict[str, Any]]:
    """Return the optimizer's groups with the names of their parameters, as far as they are told."""
    optimizer = contents.about.extra.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


def _by_group(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Return parameters' shapes group by group, as engines list them; all at once if groups are not told."""
    hyper = hyper_of(contents)
    said = contents.about.extra.get("param_shapes")
    listed = [group for group in (said if isinstance(said, list) else ()) if isinstance(group, dict)]
    for groups in (merged(listed, hyper), [group.get("params", ()) for group in _named(contents)]):
        members = [[str(name) for name in group] for group in groups]
        is_told = sorted(name for names in members for name in names) == sorted(shapes)
        if is_told and len(members) == len(hyper):
            return [{name: shapes[name] for name in names} for names in members]
    return [dict(shapes)]


def engine_of(contents: Contents, parts: Parts) -> dict[str, Any]:
    """Return what the engine keeps of itself, and the client's state."""
    extra = contents.about.extra
    shapes = {
        name: contents.tensors[next(iter(states.values()))].shape for name, states in parts.states.items()
    }
    for name, states in parts.states.items():
        shapes[name] = contents.tensors[
            next(number for state, number in states.items() if state != "step")
        ].shape
    step = contents.about.step or 0
    defaults: dict[str, Any] = {
        "buffer_names": [],
        "optimizer": None,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_samples": 0,
        "dp_world_size": 1,
        "ds_version": _VERSION,
    }
    said = {key: value for key, value in extra.items() if key not in _NOT_OURS}
    own = {"global_steps": step, "mp_world_size": 1, "param_shapes": _by_group(contents, shapes)}
    return {**defaults, **said, **own}
