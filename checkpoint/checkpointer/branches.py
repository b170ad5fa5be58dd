"""Going back on purpose: what becomes of the checkpoints that are newer than the one that was restored."""

import logging
from collections.abc import Mapping
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
