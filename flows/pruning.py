"""What the command line does to let checkpoints expire. Neither Prefect nor Ray is imported."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

import checkpoint
from flows.tables import spell_bytes
from tasks.errors import SpecError


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
    _check_metrics(policies, store)
    for policy in policies:
        if isinstance(policy, checkpoint.Pinned):
            if not policy.steps:
                raise SpecError("pinned: names no step, as an empty variable may; nothing was deleted")
            checkpoint.Catalog(store).check_named(*policy.steps)
    try:
        pruned = checkpoint.prune(store, policies, now_s=now_s, grace_s=grace_s, linger_s=linger_s)
    except ValueError as error:
        raise SpecError(str(error)) from None
    return {
        "store": url,
        "policies": list(map(str, policies)),
        "kept": list(pruned.kept),
        "deleted": list(pruned.expired),
        "runs": {str(step): run for step, run in pruned.runs.items()},
        "reasons": {str(each.step): each.why for each in pruned.verdicts},
        "objects": [removed.key for removed in pruned.removed],
        "freed_bytes": pruned.num_bytes,
        "waiting_bytes": pruned.num_waiting_bytes,
        "problems": list(pruned.problems),
    }


def _check_metrics(policies: Sequence[checkpoint.Policy], store: checkpoint.Store) -> None:
    """Refuse to keep the best by what no checkpoint tells: none would be kept. Raises SpecError."""
    asked = {one.metric for one in policies if isinstance(one, checkpoint.BestByMetric)}
    there = checkpoint.metric_names(store) if asked else set()
    if missing := sorted(asked - there):
        known = ", ".join(sorted(there)) or "none"
        raise SpecError(
            f"no checkpoint of {store} has a metric {missing[0]!r} (there: {known}): none would be the best, "
            "so nothing was deleted"
        )


def _whose(runs: dict[str, str]) -> str:
    """Say whose the checkpoints of each step are, run by run."""
    steps: dict[str, list[int]] = {}
    for step, run in runs.items():
        steps.setdefault(run, []).append(int(step))
    return "; ".join(f"{run!r} has steps {_list(found)}" for run, found in sorted(steps.items()))


def draw_pruning(console: Console, pruned: dict[str, Any]) -> None:
    """Draw what `prune` deleted."""
    console.print(f"kept, by {' and '.join(pruned['policies'])}: steps {_list(pruned['kept'])}", markup=False)
    for step in pruned["kept"]:
        console.print(f"  {step}: {pruned['reasons'][str(step)]}", markup=False, style="dim")
    if len(set(pruned["runs"].values())) > 1:
        console.print(f"they are of several runs: {_whose(pruned['runs'])}", markup=False, style="yellow")
    freed = spell_bytes(pruned["freed_bytes"])
    console.print(f"deleted: steps {_list(pruned['deleted'])}; {len(pruned['objects'])} objects, {freed}")
    for key in pruned["objects"]:
        console.print(f"  {key}", markup=False, style="dim")
    if pruned["waiting_bytes"]:
        waiting = spell_bytes(pruned["waiting_bytes"])
        console.print(f"{waiting} of expired checkpoints are left for those who still read them: prune later")
    for problem in pruned["problems"]:
        console.print(problem, markup=False, style="red")


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
