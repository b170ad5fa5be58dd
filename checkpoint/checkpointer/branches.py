"""Going back on purpose: what becomes of the checkpoints that are newer than the one that was restored."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import Conflict, StoreUnavailable
from checkpoint.format.keys import ABANDONED
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.marks import tags
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.checkpoint")

Newer = Literal["keep", "set aside"]
Stores = Mapping[str, Store]
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint that stood in a store when it was opened, which nobody has asked for yet."""

    step: int
    run: str


def newest_in(store: Store) -> Newest | None:
    """Find the newest checkpoint of a store that can be read."""
    manifest = Catalog(store).newest()
    return None if manifest is None else Newest(manifest.step, manifest.run)


def check_first(newest: Newest, store: Store, run: str, step: int) -> None:
    """Raise Conflict if the first save of a run would come between another's checkpoints, or take a step."""
    if newest.run != run:
        raise Conflict(
            f"{store} has checkpoints of run {newest.run!r} (the newest is step {newest.step}), and this is "
            f"run {run!r}: give this one a store of its own, or restore(state, run={newest.run!r}) first, to "
            "go on from there"
        )
    if step <= newest.step:
        raise Conflict(
            f"{store} has step {newest.step} already: restore(state) first, to go on from there, "
            f"or give this training a store of its own; step {step} would be taken"
        )


def newer_steps(stores: Stores, step: int) -> tuple[int, ...]:
    """List the steps above one that any store has; one that does not answer is passed over, and told."""
    found: set[int] = set()
    for name, store in stores.items():
        try:
            found.update(Catalog(store).steps())
        except StoreUnavailable as error:
            log.warning("whether %s has checkpoints newer than step %d is unknown: %s", name, step, error)
    return tuple(sorted(one for one in found if one > step))


def abandon(stores: Stores, step: int) -> tuple[int, ...]:
    """Set the checkpoints above a step aside, in every store, newest first; return their steps.

    Broken off, it is called again. Raises Conflict, before anything is moved, if one of them has a tag;
    StoreUnavailable.
    """
    above = {name: [one for one in Catalog(store).steps() if one > step] for name, store in stores.items()}
    for name, store in stores.items():
        for tagged, at in tags(store).items():
            if at in above[name]:
                raise Conflict(
                    f"step {at} is tagged {tagged!r} on {name} and so is not set aside, and nothing else: "
                    "take the tag away (`untag`), or go on from here in a store of its own"
                )
    for name, steps in above.items():
        for one in reversed(steps):
            why = f"training went back to step {step} and on from there"
            set_aside(stores[name], one, why, policy="abandoned")
    return tuple(sorted({one for steps in above.values() for one in steps}))


def told_kept(ahead: tuple[int, ...], step: int) -> str:
    """Say that newer checkpoints stay, and what that means."""
    return (
        f"checkpoints newer than the restored step {step} stay ({named(ahead)}): nothing can be saved after "
        f'it until restore(state, step={step}, newer="set aside") moved them; or go on in another store'
    )


def told_abandoned(gone: tuple[int, ...], step: int) -> str:
    """Say where newer checkpoints went."""
    return (
        f"checkpoints newer than the restored step {step} were set aside ({named(gone)}): their manifests "
        f"are in {ABANDONED} of each store, and the next prune frees their bytes"
    )


def named(steps: tuple[int, ...]) -> str:
    """Name some steps."""
    some = ", ".join(map(str, steps[:_MAX_NAMED]))
    more = f" and {len(steps) - _MAX_NAMED} more" if len(steps) > _MAX_NAMED else ""
    return f"step{'s' if len(steps) > 1 else ''} {some}{more}"
