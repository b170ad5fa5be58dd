"""What the command line does with stores: look, verify, prune, copy. Neither Prefect nor Ray is imported."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console

import checkpoint
from flows.following import Followed, Listener
from flows.tables import Leaf, draw_table, draw_tree, spell_bytes
from tasks.errors import NoSuchRun, SpecError, Unusable

_BEGUN = (
    "packs/",
    "control/generations/",
    "control/promoting/",
)  # what a store has before its first checkpoint


def find(where: str, runs_dir: Path) -> str:
    """Find the store that a URL, a directory or a run's name means. Raises NoSuchRun if there is none."""
    if "://" in where:
        return where
    where = os.path.expanduser(where)  # shells do not, within --option=~/x or quotes
    spec = runs_dir / where / "spec.json"
    if os.path.isfile(spec):  # as `Path.is_file` does not, it says no where nobody may look
        return _store_of(spec)
    if os.path.isfile(Path(where) / "spec.json"):
        with suppress(Unusable):  # of something else that lies there
            return _store_of(Path(where) / "spec.json")
    if os.path.exists(where):
        return where
    there = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/spec.json"))) or "none"
    raise NoSuchRun(
        f"{where} is neither a URL nor a directory nor a run in {runs_dir.absolute()} (there: {there})"
    )


def _store_of(spec: Path) -> str:
    """Read where a run keeps its checkpoints; as plain JSON, since the core does without pydantic."""
    try:
        url = json.loads(spec.read_bytes())["checkpoint"]["store"]
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(
            f"{spec} is not a run's specification ({error!r}); give the store's URL instead"
        ) from error
    return str(spec.parent / "store") if url is None else str(url).replace("{run}", spec.parent.name)


def look(url: str, step: int | None) -> dict[str, Any]:
    """List a store's checkpoints, and what one of them (by default the newest sound one) holds."""
    catalog = checkpoint.Catalog(checkpoint.open_store(url))
    if step is not None:
        catalog.check_named(step)
    steps = catalog.steps()
    shown = step if step is not None else catalog.latest()
    return {
        "store": url,
        "checkpoints": [_describe(catalog, each) for each in steps],
        "shown": shown,
        **({"tensors": []} if shown is None else _contents(catalog.manifest(shown))),
    }


def look_anywhere(url: str, step: int | None, format: str | None) -> dict[str, Any]:
    """Look at a store, or, if there is none or a format is named, at a foreign checkpoint."""
    if format is None and _is_store(url):
        return look(url, step)
    try:
        found = _look_at_foreign(url, format)
    except (checkpoint.Unsupported, checkpoint.NotFound):
        if format is None and _is_begun(url):
            return look(url, step)
        raise
    if step is not None:
        raise checkpoint.NoSuchStep(f"{url} is no store of checkpoints, so it has no step {step}")
    return found


def _is_store(url: str) -> bool:
    """Whether there are checkpoints of ours; a single file is no store. Imports no framework to find out."""
    try:
        return bool(checkpoint.Catalog(checkpoint.open_store(url)).steps())
    except checkpoint.StoreRefused:
        return False


def _is_begun(url: str) -> bool:
    """Whether a store is there that waits for its first checkpoint, of a training or a conversion."""
    try:
        store = checkpoint.open_store(url)
        return any(store.list(prefix) for prefix in _BEGUN)
    except checkpoint.StoreRefused:
        return False


def _look_at_foreign(url: str, format: str | None) -> dict[str, Any]:
    found = checkpoint.look_at_foreign(url, format)
    spread = ", ".join(f"{axis}={ranks}" for axis, ranks in found.axes.items())
    return {
        "store": url,
        "format": found.format,
        "checkpoints": [],
        "shown": found.step,
        "layout": spread or None,
        "sizes": dict(found.sizes),
        "rules": found.rules,
        "notes": list(found.notes),
        "plain": list(found.plain),
        "tensors": [
            {
                "name": one.name,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "bytes": one.num_bytes,
                "at": dict(one.at),
            }
            for one in found.tensors
        ],
    }


class Extent(Enum):
    """Which checkpoints are meant if none is named."""

    NEWEST = "newest"
    ALL = "all"


def choose_steps(url: str, steps: Sequence[int], extent: Extent) -> list[int]:
    """Return the steps that are named, or all, or the newest. Raises NoCheckpoint; SpecError for both."""
    if steps and extent is Extent.ALL:
        raise SpecError("--all copies every checkpoint: give --step or --all, not both")
    catalog = checkpoint.Catalog(checkpoint.open_store(url))
    catalog.check_named(*steps)
    there = catalog.steps()
    if not there:
        raise checkpoint.NoCheckpoint(f"{url} holds no checkpoint, so nothing was copied; check the URL")
    return sorted(set(steps)) or (there if extent is Extent.ALL else there[-1:])


def copy(source: str, target: str, step: int, *, listener: Listener = lambda _: None) -> dict[str, Any]:
    """Copy a checkpoint to another store."""
    store = checkpoint.open_store(source)
    there = checkpoint.open_store(target)
    checkpoint.check_own(there)
    followed = Followed(store, f"copying step {step}", _packed_bytes(store, [step]), listener)
    return asdict(checkpoint.promote(followed, there, step))


def _packed_bytes(store: checkpoint.Store, steps: Sequence[int]) -> int:
    """Return how many bytes the packs of checkpoints have; what cannot be read tells nothing."""
    packs: dict[str, int] = {}
    for step in steps:
        try:
            manifest = checkpoint.Catalog(store).manifest(step)
        except checkpoint.CheckpointError:  # whoever reads it next says what is wrong with it
            continue
        packs |= {pack.key: pack.num_bytes for pack in manifest.packs}
    return sum(packs.values())


def draw_copies(console: Console, copied: list[dict[str, Any]]) -> None:
    """Draw what was copied."""
    rows = [
        (
            each["step"],
            "new" if each["is_new"] else "was there",
            each["num_copied"],
            spell_bytes(each["num_bytes"]),
            each["num_shared"],
        )
        for each in copied
    ]
    draw_table(console, f"-> {copied[0]['target']}", ("step", "", "objects", "copied", "shared"), rows)


def _describe(catalog: checkpoint.Catalog, step: int) -> dict[str, Any]:
    """Describe one checkpoint; `trouble` says why its manifest cannot be read, if it cannot."""
    try:
        manifest = catalog.manifest(step)
    except checkpoint.CheckpointError as error:
        return {"step": step, "trouble": str(error), "kind": type(error).__name__}
    return {
        "step": step,
        "run": manifest.run,
        "generation": manifest.generation,
        "created_utc": manifest.created_utc,
        "tensors": len(manifest.tensors),
        "packs": len(manifest.packs),
        "stored_bytes": sum(pack.num_bytes for pack in manifest.packs),
        "meta": manifest.meta,
        "trouble": "",
    }


def _contents(manifest: checkpoint.Manifest) -> dict[str, Any]:
    """Describe what a checkpoint holds, how it is cut, and who wrote it."""
    layout = manifest.meta.get("layout")
    return {
        "layout": layout.get("scheme") if isinstance(layout, dict) else None,
        "written": {
            "run": manifest.run,
            "generation": manifest.generation,
            "token": manifest.token,
            "created_utc": manifest.created_utc,
            "spec_digest": manifest.spec_digest,
        },
        "converted": manifest.meta.get("converted"),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.num_bytes,
                "fingerprint": f"{tensor.fingerprint:016x}",
            }
            for tensor in manifest.tensors
        ],
    }


def draw_store(console: Console, found: dict[str, Any]) -> None:
    """Draw what `look` found."""
    if "format" in found:
        _draw_contents(console, found, f"{found['format']} checkpoint in {found['store']}")
        return
    if not found["checkpoints"]:
        console.print(f"{found['store']} holds no checkpoint", markup=False)
        return
    head = ("step", "run", "generation", "created (UTC)", "tensors", "packs", "stored")
    draw_table(console, f"checkpoints in {found['store']}", head, map(_row, found["checkpoints"]))
    for each in found["checkpoints"]:
        if each["trouble"]:
            console.print(f"step {each['step']}: {each['trouble']}", style="red", markup=False)
    if found["shown"] is not None:
        _draw_contents(console, found, f"step {found['shown']}")


def _draw_contents(console: Console, found: dict[str, Any], title: str) -> None:
    """Draw the tensors of one checkpoint as a tree, under what is known of the whole."""
    for what in ("layout", "written", "converted", "sizes", "rules", "plain", "notes"):
        if found.get(what):
            console.print(f"{what}: {_plain(found[what])}", markup=False, style="dim", soft_wrap=True)
    leaves = [Leaf(_path(each), _described(each), each["bytes"]) for each in found["tensors"]]
    draw_tree(console, title, leaves, "." if "format" in found else "/")


def _path(each: dict[str, Any]) -> tuple[str, ...]:
    path = tuple(part for part in re.split(r"[/.]", each["name"]) if part) or ("(no name)",)
    return path if "/" not in each["name"] else tuple(each["name"].split("/"))


def _described(each: dict[str, Any]) -> str:
    shape = "x".join(map(str, each["shape"])) or "scalar"
    at = "".join(f" {axis}={rank}" for axis, rank in each.get("at", {}).items())
    mark = f"  {each['fingerprint']}" if "fingerprint" in each else ""
    return f"{each['dtype']} {shape}  {spell_bytes(each['bytes'])}{mark}{at}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items() if item)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(each: dict[str, Any]) -> tuple[object, ...]:
    if each["trouble"]:
        state = "NEWER" if each["kind"] == "Unsupported" else "DAMAGED"
        return (each["step"], state, *("-",) * 5)
    when = each["created_utc"][:16].replace("T", " ")
    about = (each["step"], each["run"], each["generation"], when, each["tensors"], each["packs"])
    return (*about, spell_bytes(each["stored_bytes"]))


def verify(
    url: str,
    step: int | None,
    *,
    since_s: float | None = None,
    budget_bytes: int | None = None,
    listener: Listener = lambda _: None,
) -> list[dict[str, Any]]:
    """Read one checkpoint back, or all of them but those proved since; what they share is read once.

    Of what was not read `whole` is None, and `note` says why.
    """
    store = checkpoint.open_store(url)
    steps = checkpoint.Catalog(store).steps() if step is None else [step]
    if not steps:
        raise checkpoint.NoCheckpoint(f"{url} holds no checkpoint; check the URL")
    followed = Followed(store, "verifying", _packed_bytes(store, steps), listener)
    found = checkpoint.verify(followed, step, since_s=since_s, budget_bytes=budget_bytes)
    results: list[dict[str, Any]] = [
        {
            "step": each.step,
            "whole": each.is_sound,
            "chunks": each.num_chunks,
            "bytes": each.num_bytes,
            "bad": [f"{bad.item}: {bad.why}" for bad in each.bad],
            "spare": [f"{bad.item}: {bad.why}" for bad in each.spare],
            "note": found.unrecorded and f"the store does not know of it: {found.unrecorded}",
        }
        for each in found.checkpoints
    ]
    unread = {
        **dict.fromkeys(found.skipped, "not read: it was proved recently enough"),
        **dict.fromkeys(found.left, "not read: the budget was spent; verify again"),
    }
    nothing: dict[str, Any] = {"whole": None, "chunks": 0, "bytes": 0, "bad": [], "spare": []}
    results += [{"step": each, **nothing, "note": why} for each, why in unread.items()]
    return sorted(results, key=lambda each: int(each["step"]))


_CONTENT = {True: "whole", False: "DAMAGED", None: "?"}


def draw_verification(console: Console, results: list[dict[str, Any]]) -> None:
    """Draw what `verify` found."""
    rows = [
        (
            each["step"],
            _CONTENT[each["whole"]],
            each["chunks"],
            spell_bytes(each["bytes"]),
            "\n".join(filter(None, [*each["bad"], *each["spare"], each["note"]])),
        )
        for each in results
    ]
    draw_table(console, "", ("step", "content", "chunks", "read", "bad"), rows)
