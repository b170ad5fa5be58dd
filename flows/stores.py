"""What the command line does with stores: look, verify, prune. Neither Prefect nor Ray is imported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import checkpoint
from flows.tables import draw_table, spell_bytes
from tasks.errors import NoSuchRun, SpecError, Unusable


def find(where: str, runs_dir: Path) -> str:
    """Find the store that a URL, a directory or a run's name means. Raises NoSuchRun if there is none."""
    if "://" in where:
        return where
    spec = runs_dir / where / "spec.json"
    if spec.is_file():
        return _store_of(spec)
    if (Path(where) / "spec.json").is_file():
        return _store_of(Path(where) / "spec.json")
    if Path(where).is_dir():
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
    steps = catalog.steps()
    shown = step if step is not None else catalog.latest()
    if shown is not None and shown not in steps:
        raise checkpoint.NoCheckpoint(f"{url} has no checkpoint of step {shown}; it has: {_list(steps)}")
    return {
        "store": url,
        "checkpoints": [_describe(catalog, each) for each in steps],
        "shown": shown,
        "tensors": [] if shown is None else _contents(catalog.manifest(shown)),
    }


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _describe(catalog: checkpoint.Catalog, step: int) -> dict[str, Any]:
    """Describe one checkpoint; `trouble` says why its manifest cannot be read, if it cannot."""
    try:
        manifest = catalog.manifest(step)
    except checkpoint.CheckpointError as error:
        return {"step": step, "trouble": str(error)}
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


def _contents(manifest: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "fingerprint": f"{tensor.fingerprint:016x}",
        }
        for tensor in manifest.tensors
    ]


def draw_store(console: Console, found: dict[str, Any]) -> None:
    """Draw what `look` found."""
    if not found["checkpoints"]:
        console.print(f"{found['store']} holds no checkpoint", markup=False)
        return
    head = ("step", "run", "generation", "created (UTC)", "tensors", "packs", "stored")
    draw_table(console, f"checkpoints in {found['store']}", head, map(_row, found["checkpoints"]))
    for each in found["checkpoints"]:
        if each["trouble"]:
            console.print(f"step {each['step']}: {each['trouble']}", style="red", markup=False)
    rows = [
        (each["name"], each["dtype"], "x".join(map(str, each["shape"])) or "scalar", each["fingerprint"])
        for each in found["tensors"]
    ]
    draw_table(console, f"step {found['shown']}", ("tensor", "dtype", "shape", "fingerprint"), rows)


def _row(each: dict[str, Any]) -> tuple[object, ...]:
    if each["trouble"]:
        return (each["step"], "DAMAGED", *("-",) * 5)
    when = each["created_utc"][:16].replace("T", " ")
    about = (each["step"], each["run"], each["generation"], when, each["tensors"], each["packs"])
    return (*about, spell_bytes(each["stored_bytes"]))


def verify(
    url: str, step: int | None, *, since_s: float | None = None, budget_bytes: int | None = None
) -> list[dict[str, Any]]:
    """Read one checkpoint back, or all of them but those proved since; what they share is read once."""
    store = checkpoint.open_store(url)
    if step is None and not checkpoint.Catalog(store).steps():
        raise checkpoint.NoCheckpoint(f"{url} holds no checkpoint; check the URL")
    found = checkpoint.verify(store, step, since_s=since_s, budget_bytes=budget_bytes)
    return [
        {
            "step": each.step,
            "whole": each.is_sound,
            "chunks": each.num_chunks,
            "bytes": each.num_bytes,
            "bad": [f"{bad.item}: {bad.why}" for bad in each.bad],
        }
        for each in sorted(found.checkpoints, key=lambda one: one.step)
    ]


def draw_verification(console: Console, results: list[dict[str, Any]]) -> None:
    """Draw what `verify` found."""
    rows = [
        (
            each["step"],
            "whole" if each["whole"] else "DAMAGED",
            each["chunks"],
            spell_bytes(each["bytes"]),
            "\n".join(each["bad"]),
        )
        for each in results
    ]
    draw_table(console, "", ("step", "content", "chunks", "read", "bad"), rows)


def prune(
    url: str, keep: Sequence[str], *, now_s: float, grace_s: float, linger_s: float = 60.0
) -> dict[str, Any]:
    """Delete what no policy keeps; they are written as `checkpoint.parse_policy` reads them."""
    try:
        policies = [checkpoint.parse_policy(text) for text in keep]
    except ValueError as error:
        raise SpecError(str(error)) from None
    store = checkpoint.open_store(url)
    if not checkpoint.Catalog(store).steps():
        raise checkpoint.NoCheckpoint(f"{url} holds no checkpoint, so nothing was deleted; check the URL")
    pruned = checkpoint.prune(store, policies, now_s=now_s, grace_s=grace_s, linger_s=linger_s)
    return {
        "store": url,
        "policies": list(map(str, policies)),
        "kept": list(pruned.kept),
        "deleted": list(pruned.expired),
        "reasons": {str(each.step): each.why for each in pruned.verdicts},
        "objects": [removed.key for removed in pruned.removed],
        "freed_bytes": pruned.num_bytes,
        "waiting_bytes": pruned.num_waiting_bytes,
        "problems": list(pruned.problems),
    }


def draw_pruning(console: Console, pruned: dict[str, Any]) -> None:
    """Draw what `prune` deleted."""
    console.print(f"kept, by {' and '.join(pruned['policies'])}: steps {_list(pruned['kept'])}", markup=False)
    for step in pruned["kept"]:
        console.print(f"  {step}: {pruned['reasons'][str(step)]}", markup=False, style="dim")
    freed = spell_bytes(pruned["freed_bytes"])
    console.print(f"deleted: steps {_list(pruned['deleted'])}; {len(pruned['objects'])} objects, {freed}")
    for key in pruned["objects"]:
        console.print(f"  {key}", markup=False, style="dim")
    if pruned["waiting_bytes"]:
        waiting = spell_bytes(pruned["waiting_bytes"])
        console.print(f"{waiting} of expired checkpoints are left for those who still read them: prune later")
    for problem in pruned["problems"]:
        console.print(problem, markup=False, style="red")
