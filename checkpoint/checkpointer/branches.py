"""Going back on purpose: what becomes of the checkpoints that are newer than the one that was restored."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from checkpoint.engine.asking import ask_for_steps
from checkpoint.engine.catalog import Catalog
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.source import StoreSource
from checkpoint.errors import Conflict, StoreUnavailable
from checkpoint.format.keys import ABANDONED
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.marks import tags
from checkpoint.store.contract import Store

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


def check_unfinished(steps: tuple[int, ...], step: int) -> None:
    """Raise Conflict if what a predecessor captured, and its keeper still writes, takes a step."""
    if steps:
        raise Conflict(
            f"the keeper of this host is still writing {named(steps)}, which nobody restored: restore(state) "
            "first, which waits for that and goes on from there, or give this training a store of its own; "
            f"step {step} would be taken"
        )


def told_unsettled(steps: tuple[int, ...]) -> str:
    """Say what a restore did without."""
    return (
        f"{named(steps)} captured and not durable: the store took nothing for as long as a restore waits "
        "(`ReadPolicy(empty_patience_s=)`, `Options(flush_s=)`). Done without; it may come to be durable "
        "later, in the place of what is saved anew"
    )


@dataclass(frozen=True, slots=True)
class Ahead:
    """The steps above one that any store has, and the names of the stores that did not answer."""

    steps: tuple[int, ...]
    unreached: tuple[str, ...]


def newer_steps(stores: Stores, step: int, policy: ReadPolicy, unreached: Collection[str] = ()) -> Ahead:
    """List the steps above one that any store has; those known to be out of reach are not asked again."""
    names = [name for name in stores if name not in unreached]
    silent = set(unreached) & set(stores)
    try:
        answers = ask_for_steps([StoreSource(stores[name], name) for name in names], policy)
    except StoreUnavailable:  # what was restored was in memory, and in no store that answers
        return Ahead((), tuple(stores))
    silent.update(names[number] for number in answers.outages)
    return Ahead(
        tuple(one for one in reversed(answers.steps) if one > step),
        tuple(name for name in stores if name in silent),
    )


def abandon(
    stores: Stores, step: int, policy: ReadPolicy, unreached: Collection[str] = ()
) -> tuple[int, ...]:
    """Set the checkpoints above a step aside, in every store, newest first; return their steps.

    Broken off, it is called again. Before anything is moved it raises Conflict if one of them has a tag;
    StoreUnavailable if a store does not answer, from which they would come back.
    """
    if silent := newer_steps(stores, step, policy, unreached).unreached:
        raise StoreUnavailable(
            f"{', '.join(silent)} did not answer, and so nothing was set aside: what is newer than step "
            f"{step} there would be restored again one day. Try again later, or go on in another store"
        )
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


def told_unknown(unreached: tuple[str, ...], step: int) -> str:
    """Say where nobody could look for newer checkpoints."""
    return (
        f"whether {', '.join(unreached)} has checkpoints newer than the restored step {step} is unknown: it "
        "did not answer"
    )


def told_kept(step: int, ahead: tuple[int, ...] = ()) -> str:
    """Say that newer checkpoints stay, and what that means."""
    which = f" ({named(ahead)})" if ahead else ""
    return (
        f"checkpoints newer than the restored step {step} stay{which}: nothing can be saved after "
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
