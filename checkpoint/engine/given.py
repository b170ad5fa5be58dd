"""What a caller gives beside the state: a step, metrics, a data cursor; made plain, or refused by name.

A checkpoint with a value that no manifest can hold would be lost after `save` has returned.
"""

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from checkpoint.errors import FormatError, Unsupported
from checkpoint.format.json_fields import dump_json
from checkpoint.format.keys import MAX_STEP
from checkpoint.format.manifest import metrics_to_json
from checkpoint.format.tree import MAX_DEPTH, Json, is_bulk


def plain_step(step: Any) -> int:
    """Return a step as an int. Raises TypeError, ValueError."""
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(
            f"a step is a whole number, and {_shown(step)} is a {_type_name(step)}: give an int"
        ) from None
    if not 0 <= number <= MAX_STEP:
        raise ValueError(f"a step is a whole number from 0 to {MAX_STEP}, not {number}")
    return number


def plain_meta(meta: Mapping[str, Any]) -> dict[str, Json]:
    """Return a manifest's meta as plain JSON; its "metrics" as numbers.

    Raises Unsupported naming what has no plain form.
    """
    plain = {
        name: metrics_to_json(plain_metrics(value)) if name == "metrics" else _plain(value, name)
        for name, value in meta.items()
    }
    dump_json(plain, "what was given beside the state")  # an int with too many digits
    return plain


def plain_metrics(metrics: Any) -> dict[str, float]:
    """Return metrics as floats: of numbers, and of numpy's and torch's with one element.

    A tensor on a device is waited for. What is not finite stays as it is, and is never the best of its kind.
    Raises Unsupported naming the metric.
    """
    if not isinstance(metrics, Mapping):
        raise Unsupported(f"metrics are numbers by name, and {_shown(metrics)} is a {_type_name(metrics)}")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if type(name) is not str:
            raise Unsupported(f"a metric's name is a str, not {_shown(name)}")
        single = _single(value)
        try:
            if not isinstance(single, numbers.Real):
                raise TypeError
            found[name] = float(single)
        except (TypeError, OverflowError):
            raise Unsupported(
                f"metric {name!r} is {_shown(value)}, a {_type_name(value)}: give a number"
            ) from None
    return found


def _plain(value: Any, path: str, depth: int = 0) -> Json:
    """Return nested values as JSON has them: tuples as lists, numpy's and torch's numbers as plain ones."""
    if depth > MAX_DEPTH:
        raise FormatError(f"{path[:80]}... is nested deeper than {MAX_DEPTH} levels: does it contain itself?")
    value = _single(value)
    if value is None or type(value) in (bool, int, str):
        return value  # type: ignore[no-any-return]  # checked by its exact type
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        if is_bulk(value):
            return list(value)
        return [_plain(item, f"{path}/{number}", depth + 1) for number, item in enumerate(value)]
    if isinstance(value, dict):
        if wrong := [key for key in value if type(key) is not str]:
            raise Unsupported(
                f"{path} has the key {_shown(wrong[0])}: JSON's are text; give str({wrong[0]!r})"
            )
        return {key: _plain(item, f"{path}/{key}", depth + 1) for key, item in value.items()}
    raise Unsupported(
        f"{path} is {_shown(value)}, a {_type_name(value)}, which plain JSON cannot hold: give finite "
        "numbers, text, lists and dicts of them; anything else belongs into the state"
    )


def _single(value: Any) -> Any:
    """Return the one element of a numpy or torch value as a plain number."""
    if isinstance(value, torch.Tensor):
        return value.detach().item() if value.numel() == 1 and not value.is_meta else value
    if isinstance(value, (np.generic, np.ndarray)):
        return value.item() if value.size == 1 else value
    return value


def _shown(value: Any) -> str:
    return repr(value)[:60] if not isinstance(value, torch.Tensor) else f"of shape {list(value.shape)}"


def _type_name(value: Any) -> str:
    return type(value).__name__
