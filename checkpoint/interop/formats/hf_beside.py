"""What lies beside the weights of a Hugging Face model and goes along: configuration, tokenizer, code."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from checkpoint.errors import Unsupported
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.hf_files import parsed
from checkpoint.interop.place import Place

_CONFIG = "config.json"
_ADAPTER, _DIFFUSERS = "adapter_config.json", "_diffusers_version"
_BESIDE = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken|py|md)")
_MAX_BYTES = 64 << 20


def read_beside(place: Place) -> dict[str, Any]:
    """Return the configuration, as `config`, and small files that go along, as `files`. Raises Corrupt."""
    files = {
        name: place.read(name)
        for name, size in place.files.items()
        if _BESIDE.fullmatch(name) and not name.endswith(".index.json") and size <= _MAX_BYTES
    }
    return {
        "config": parsed(files[_CONFIG], f"{_CONFIG} in {place}") if _CONFIG in files else {},
        "files": files,
    }


def write_beside(draft: Draft, extra: Mapping[str, Any]) -> None:
    """Write them again, the configuration anew if it was changed. Raises Unsupported."""
    beside, config = _files(extra), extra.get("config")
    if config and isinstance(config, dict) and _has_changed(beside.get(_CONFIG), config):
        with suppress(TypeError, ValueError):  # another program's, and not of JSON's types: it is left out
            beside[_CONFIG] = json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    for name, data in beside.items():
        if not _BESIDE.fullmatch(name):
            raise Unsupported(f"{name!r} is no name for a file beside a model's weights")
        with draft.writing(name) as file:
            file.write(data)


def stem_of(extra: Mapping[str, Any]) -> str:
    """Return how the name of the weights' file begins, by which those look for it whose model this is."""
    files, config = _files(extra), extra.get("config")
    if _ADAPTER in files and _CONFIG not in files:
        return "adapter_model"  # PEFT's
    return "diffusion_pytorch_model" if isinstance(config, dict) and _DIFFUSERS in config else "model"


def _files(extra: Mapping[str, Any]) -> dict[str, bytes]:
    told = extra.get("files")
    if not isinstance(told, dict) or not all(isinstance(data, bytes) for data in told.values()):
        return {}  # another program's, of the same name
    return dict(told)


def _has_changed(data: bytes | None, config: Mapping[str, Any]) -> bool:
    return data is None or parsed(data, _CONFIG) != config
