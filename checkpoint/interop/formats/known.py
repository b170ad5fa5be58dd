"""The foreign formats there are: which one a directory is in, and how each is opened and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol

from checkpoint.errors import Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.draft import Draft
from checkpoint.interop.formats.contract import About, Array, Contents, ForeignCheckpoint
from checkpoint.interop.formats.dcp import looks_like_dcp, open_dcp
from checkpoint.interop.formats.deepspeed import hint_without_zero, looks_like_deepspeed, open_deepspeed
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
from checkpoint.interop.moves import Foreign
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
    endings: tuple[str, ...] = ()  # of files that are its own, though they look like another format's


@dataclass(frozen=True, slots=True)
class _Noted:
    """A foreign checkpoint of which there is more to say than its files do."""

    opened: ForeignCheckpoint
    about: About

    @property
    def tensors(self) -> Sequence[Foreign]:
        """Its tensors."""
        return self.opened.tensors

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box of a tensor."""
        return self.opened.read(number, box)

    def settle(self) -> None:
        """See that what was read is what checksums in the files say."""
        self.opened.settle()


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
        endings=(".pt",),
    ),
    Format(
        "megatron-dist",
        "Megatron-Core's distributed checkpoints (torch_dist)",
        looks_like_megatron_dist,
        open_megatron_dist,
        _later("megatron_dist_writing", "write_megatron_dist"),
        holds_optimizer=True,
        endings=(".pt", ".distcp", ".metadata"),
    ),
    Format(
        "deepspeed-universal",
        "DeepSpeed's universal folders",
        looks_like_deepspeed_universal,
        open_deepspeed_universal,
        _later("deepspeed_writing", "write_deepspeed_universal"),
        holds_optimizer=True,
        is_stale=lambda place: is_left_behind(place, "latest_universal"),
        endings=(".pt",),
    ),
    Format(
        "deepspeed",
        "DeepSpeed ZeRO",
        looks_like_deepspeed,
        open_deepspeed,
        _later("deepspeed_zero_writing", "write_deepspeed"),
        holds_optimizer=True,
        endings=(".pt",),
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
_OF_STORES = ("packs/", "index/", "control/", ".incoming/")  # what one has before its first manifest
# In this order it is asked what a directory looks like: the more particular ones first.
FORMATS: Mapping[str, Format] = {one.name: one for one in _KNOWN}


def open_foreign(url: str, format: str | None = None) -> ForeignCheckpoint:
    """Open a foreign checkpoint, in the format of this name or in the first one that it looks like.

    Raises Unsupported, saying what is known and what was seen, if it looks like none of them.
    """
    return open_place(Place(url), format)


def open_place(place: Place, format: str | None = None) -> ForeignCheckpoint:
    """Open a foreign checkpoint where there is already a place to read. Raises Unsupported."""
    if format is not None:
        return _named(format).open(place)
    taken = detect(place)
    opened, notes = taken.open(place), _beside(taken, place.files)
    about = opened.about
    return _Noted(opened, replace(about, notes=(*about.notes, *notes))) if notes else opened


def detect(place: Place) -> Format:
    """Return the format that a directory looks like; of several, one still used. Raises Unsupported."""
    likely = [one for one in FORMATS.values() if one.looks_like(place.files)]
    if likely:
        return next((one for one in likely if not one.is_stale(place)), likely[0])
    if hint := hint_without_zero(place):
        raise Unsupported(hint)
    if all(path.startswith(_OF_STORES) for path in place.files):
        raise Unsupported(
            f"{place} holds no checkpoint: it is a store of ours to which none was committed yet. Let who "
            "writes it finish, or do that again"
        )
    raise Unsupported(
        f"{place} looks like none of {', '.join(FORMATS)}; it holds {_listed(sorted(place.files))}. "
        "If it is one of them, name its format"
    )


def _beside(taken: Format, files: Mapping[str, int]) -> list[str]:
    """Return notes of the files that other formats would have read."""
    notes = []
    for other in FORMATS.values():
        theirs = [
            path
            for path, size in files.items()
            if not path.endswith(taken.endings) and other is not taken and other.looks_like({path: size})
        ]
        if theirs:
            notes.append(
                f"it is read as {taken.name}, and what looks like {other.name} is not looked at: "
                f"{_listed(theirs)} (--format says otherwise)"
            )
    return notes


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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _writable() -> str:
    return ", ".join(one.name for one in FORMATS.values() if one.write)
