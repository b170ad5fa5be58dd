"""Plain data of a source that were not found in what was written of it: the report tells them by name."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from checkpoint.interop.conversion.tying import TIED
from checkpoint.interop.formats.containers import containers_of
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.told import HYPER, STEP, told_numbers

# What writers are told, and what says how files are laid out: of the latter only all of it can be missed.
_SAID = {"step", TIED, "containers", "max_shard_bytes", "zero_stage", "dp_world_size", "ds_version"}
_LAYOUT = {"args", "zero", "config", "param_shapes"}
_NO_OPTIONS = {"params", "param_names", "step"}
_MOMENT = "optimizer.exp_avg."
_CONFIG = "config.json"  # among a model's files: writers make it anew where its configuration was changed
_SHOWN = 8
_GONE = object()

Tree = Mapping[str, Any]


def left_out(outbound: Contents, back: Contents, format: str) -> list[str]:
    """Return notes of the plain data that a format has no place for, or keeps otherwise."""
    there = {one.name for one in back.tensors}
    missing = [*_missing(_comparable(outbound.about.extra, there), _comparable(back.about.extra, there))]
    if missing and outbound.about.step and back.about.step is None:  # the report itself says of which it is
        missing.append("step")
    notes = []
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        notes.append(
            f"plain data that the format {format} has no place for are left out: "
            f"{', '.join(missing[:_SHOWN])}{more}"
        )
    is_invented = any(name.startswith(STEP) for name in there) and not _has_steps(outbound)
    notes += [_NO_STEPS.format(format=format)] if is_invented else []
    has_norms = any(one.name.startswith(_MOMENT) and len(one.shape) < 2 for one in outbound.tensors)
    return notes + (_decayed(outbound.about.extra, back.about.extra) if has_norms else [])


_NO_STEPS = (
    "no state of the optimizer says its step, which the format {format} needs: it is said to be that of the "
    "optimizer's groups, or else the checkpoint's own"
)


def _decayed(told: Tree, found: Tree) -> list[str]:
    """Tell of a weight decay that Megatron has for matrices alone, where all had it before."""
    before, after = (
        {value for one in _groups(extra) if type(value := one.get("weight_decay", 0.0)) in (int, float)}
        for extra in (told, found)
    )
    if HYPER not in found or len(before) != 1 or not after - before:
        return []
    return [
        f"biases and norms had a weight decay of {next(iter(before))}, as all had; Megatron gives them none"
    ]


def _groups(extra: Tree) -> list[dict[str, Any]]:
    """Return the options of an optimizer's groups."""
    optimizer = extra.get("optimizer")
    own = _dicts(optimizer.get("param_groups")) if isinstance(optimizer, dict) else []
    return [*own, *_dicts(extra.get(HYPER))]


def _has_steps(contents: Contents) -> bool:
    names = (*(one.name for one in contents.tensors), *told_numbers(contents.about.extra))
    return any(name.startswith(STEP) for name in names)


def _comparable(extra: Tree, there: Collection[str]) -> dict[str, Any]:
    """Return plain data in which what formats keep each in its own way has one form.

    Numbers of an optimizer that are there as tensors are no plain data any more.
    """
    kept = {key: value for key, value in extra.items() if key not in {*_SAID, HYPER, "optimizer"}}
    files, config = extra.get("files"), extra.get("config")
    if isinstance(files, dict) and _CONFIG in files and isinstance(config, dict):
        kept["files"] = {**files, _CONFIG: config}
    kept |= dict.fromkeys(kept.keys() & _LAYOUT, True)
    if places := containers_of(extra):
        kept |= {repr(key): item for key, item in places.kept.items()}
    optimizer = extra.get("optimizer")
    rest = dict(optimizer) if isinstance(optimizer, dict) else {}
    state = rest.pop("state", {})
    options = {name: True for group in _groups(extra) for name in group if name not in _NO_OPTIONS}
    by_kind: dict[str, dict[str, Any]] = {}
    for owner, entries in state.items() if isinstance(state, dict) else ():
        for kind, value in entries.items() if isinstance(entries, dict) else ():
            if f"optimizer.{kind}.{owner}" not in there:
                by_kind.setdefault(f"state.{kind}", {})[str(owner)] = value
    made = {**rest, "param_groups": options, **by_kind}
    return {"optimizer": {key: item for key, item in made.items() if item != {}}, **kept}


def _dicts(groups: Any) -> list[dict[str, Any]]:
    return [one for one in groups if isinstance(one, dict)] if isinstance(groups, list | tuple) else []


def _missing(told: Tree, found: Tree) -> Iterator[str]:
    """Yield the paths of what is not there or not the same; a dict of which all is gone is one of them."""
    for key, value in told.items():
        other = found.get(key, _GONE)
        if isinstance(value, dict) and value:
            below = list(_missing(value, other if isinstance(other, dict) else {}))
            is_gone = len(below) == len(value) and not (isinstance(other, dict) and other)
            yield from [str(key)] if is_gone else (f"{key}.{path}" for path in below)
        elif value not in ({}, None) and not _is_same(value, other):
            yield str(key)


def _is_same(one: Any, other: Any) -> bool:
    """Compare plain data; a tuple that came back as a list is the same, and so is a nan."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        texts = {str(key): item for key, item in other.items()}
        return len(one) == len(other) and all(
            _is_same(item, texts.get(str(key), _GONE)) for key, item in one.items()
        )
    return bool(one == other) or (one != one and other != other)
