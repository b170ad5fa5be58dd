"""The foreign formats there are: which one a directory is in, and how each is opened and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from checkpoint.errors import Unsupported
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import Contents, ForeignCheckpoint
from checkpoint.interop.formats.dcp import looks_like_dcp, open_dcp
from checkpoint.interop.formats.deepspeed import looks_like_deepspeed, open_deepspeed
from checkpoint.interop.formats.deepspeed_files import is_left_behind
from checkpoint.interop.formats.deepspeed_universal import (
    looks_like_deepspeed_universal,
    open_deepspeed_universal,
)
from checkpoint.interop.formats.hf import looks_like_hf, open_hf, write_hf
from checkpoint.interop.formats.megatron import looks_like_megatron, open_megatron
from checkpoint.interop.formats.megatron_dist import looks_like_megatron_dist, open_megatron_dist
from checkpoint.interop.formats.megatron_files import tracked_folder
from checkpoint.interop.formats.torchfile import looks_like_torch, open_torch
from checkpoint.interop.place import Place

_SHOWN = 8


class _Write(Protocol):
    def __call__(self, draft: Draft, contents: Contents, budget_bytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Format:
    """A foreign format by the name that `--format` takes."""

    name: str
    about: str
    looks_like: Callable[[Mapping[str, int]], bool]
    open: Callable[[Place], ForeignCheckpoint]
    write: _Write | None
    holds_optimizer: bool  # as far as it is written
    is_stale: Callable[[Place], bool] = lambda _: False  # beside what another format holds


def _later(module: str, name: str) -> _Write:
    """Return a writer that is imported when it is used: with torch, in seconds that readers do without."""

    def write(draft: Draft, contents: Contents, budget_bytes: int) -> None:
        getattr(import_module(f"{__package__}.{module}"), name)(draft, contents, budget_bytes)

    return write


_KNOWN = (
    Format(
        "megatron",
        "Megatron-LM, files of tensor and pipeline ranks",
        looks_like_megatron,
        open_megatron,
        _later("megatron_writing", "write_megatron"),
        holds_optimizer=False,
        is_stale=lambda place: looks_like_megatron_dist(_tracked(place)),
    ),
    Format(
        "megatron-dist",
        "Megatron-Core's distributed checkpoints (torch_dist)",
        looks_like_megatron_dist,
        open_megatron_dist,
        _later("megatron_dist_writing", "write_megatron_dist"),
        holds_optimizer=True,
    ),
    Format(
        "deepspeed-universal",
        "DeepSpeed's universal folders",
        looks_like_deepspeed_universal,
        open_deepspeed_universal,
        _later("deepspeed_writing", "write_deepspeed_universal"),
        holds_optimizer=True,
        is_stale=lambda place: is_left_behind(place, "latest_universal"),
    ),
    Format(
        "deepspeed",
        "DeepSpeed ZeRO",
        looks_like_deepspeed,
        open_deepspeed,
        _later("deepspeed_zero_writing", "write_deepspeed"),
        holds_optimizer=True,
    ),
    Format(
        "dcp",
        "torch.distributed.checkpoint",
        looks_like_dcp,
        open_dcp,
        _later("dcp_writing", "write_dcp"),
        holds_optimizer=True,
    ),
    Format("hf", "Hugging Face safetensors", looks_like_hf, open_hf, write_hf, holds_optimizer=False),
    Format(
        "torch",
        "a file of torch.save",
        looks_like_torch,
        open_torch,
        _later("torchfile_writing", "write_torch"),
        holds_optimizer=True,
    ),
)
# In this order it is asked what a directory looks like: the more particular ones first.
FORMATS: Mapping[str, Format] = {one.name: one for one in _KNOWN}


def open_foreign(url: str, format: str | None = None) -> ForeignCheckpoint:
    """Open a foreign checkpoint, in the format of this name or in the first one that it looks like.

    Raises Unsupported, saying what is known and what was seen, if it looks like none of them.
    """
    return open_place(Place(url), format)


def open_place(place: Place, format: str | None = None) -> ForeignCheckpoint:
    """Open a foreign checkpoint where there is already a place to read. Raises Unsupported."""
    return (_named(format) if format is not None else detect(place)).open(place)


def detect(place: Place) -> Format:
    """Return the format that a directory looks like; of several, one still used. Raises Unsupported."""
    likely = [one for one in FORMATS.values() if one.looks_like(place.files)]
    if likely:
        return next((one for one in likely if not one.is_stale(place)), likely[0])
    seen = sorted(place.files)
    more = f" and {len(seen) - _SHOWN} more" if len(seen) > _SHOWN else ""
    raise Unsupported(
        f"{place} looks like none of {', '.join(FORMATS)}; it holds {', '.join(seen[:_SHOWN])}{more}. "
        "If it is one of them, name its format"
    )


def write_foreign(format: str, draft: Draft, contents: Contents, budget_bytes: int) -> None:
    """Write a checkpoint in the format of this name, holding at most so many bytes of it at a time."""
    known = _named(format)
    if known.write is None:
        raise Unsupported(f"the format {format} is only read; those that are written: {_writable()}")
    known.write(draft, contents, budget_bytes)


def _named(name: str) -> Format:
    if name not in FORMATS:
        raise Unsupported(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _tracked(place: Place) -> Mapping[str, int]:
    """Return the files of the iteration that Megatron's tracker names."""
    folder = tracked_folder(place)
    return {path: size for path, size in place.files.items() if path.startswith(f"{folder}/")}


def _writable() -> str:
    return ", ".join(one.name for one in FORMATS.values() if one.write)
