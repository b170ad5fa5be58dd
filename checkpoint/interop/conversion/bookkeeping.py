"""What a manifest says of a run beside its state, a cursor in its data and metrics: exports take it along."""

import json
from collections.abc import Mapping
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.format.manifest import Manifest, metrics_from_json, metrics_to_json

_CURSOR, _METRICS = "holdfast_data_cursor", "holdfast_metrics"  # what an export calls them
_IN_META = {_CURSOR: "data_cursor", _METRICS: "metrics"}


def books_of(manifest: Manifest) -> dict[str, Any]:
    """Return what an export says of them, if there is any."""
    metrics = metrics_to_json(manifest.metrics)
    cursor = {} if manifest.data_cursor is None else {_CURSOR: manifest.data_cursor}
    return {**cursor, **({_METRICS: metrics} if metrics else {})}


def taken_over(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an export's plain data an import puts into the manifest again, as its meta has it."""
    return {_IN_META[name]: value for name, value in _sound(extra).items()}


def without_books(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data without what goes into the manifest."""
    return {name: value for name, value in extra.items() if name not in _sound(extra)}


def _sound(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be taken for them: files may say anything under these names."""
    found: dict[str, Any] = {}
    try:
        for name in extra.keys() & _IN_META.keys():
            found[name] = json.loads(json.dumps(extra[name], allow_nan=False))
        metrics_from_json(found.get(_METRICS, {}), _METRICS)
    except (TypeError, ValueError, RecursionError, Corrupt):
        return {}
    return found
