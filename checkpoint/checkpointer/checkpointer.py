"""Checkpoints for any PyTorch loop: save a step and go on; restore into what is there, in any layout."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.checkpointer.branches import (
    Newer,
    abandon,
    check_first,
    check_unfinished,
    newer_steps,
    newest_in,
    told_abandoned,
    told_kept,
    told_unknown,
    told_unsettled,
)
from checkpoint.checkpointer.giving import to_tree
from checkpoint.checkpointer.hosting import (
    AnyHost,
    find_host,
    has_keeper,
    held_by,
    open_host,
    settle,
    settled_before,
)
from checkpoint.checkpointer.meeting import (
    Meeting,
    Neighbours,
    check_neighbours,
    keepers_known_to,
    rebuilt_notes,
)
from checkpoint.checkpointer.options import NEAREST, Options, host_policy_of, place_of
from checkpoint.checkpointer.restoring import Found, Restoration, find_steps, restore_newest
from checkpoint.checkpointer.saving import Saving
from checkpoint.checkpointer.world import World, join_world
from checkpoint.engine.bounds import check_kind
from checkpoint.engine.catalog import Catalog
from checkpoint.engine.contract import MEMORY, OVERTAKEN, PARITY, Depth, Durable, Failed, Outcome
from checkpoint.engine.given import plain_metrics, plain_step
from checkpoint.engine.held import Held
from checkpoint.engine.quiet import no_collection
from checkpoint.engine.restore import Fallback
from checkpoint.engine.save import Saver
from checkpoint.engine.source import HeldSource, Source, StoreSource
from checkpoint.errors import Conflict, Mismatch, StoreError, StoreUnavailable
from checkpoint.format.tree import Json
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.policies import Policy
from checkpoint.lifecycle.tiers import is_due
from checkpoint.store.contract import Store
from checkpoint.store.open import open_store

log = logging.getLogger("holdfast.checkpoint")

_MAX_REMEMBERED = 256  # savings whose fate is still followed


class Checkpointer:
    """Saves and restores a training state: modules, optimizers, schedulers, data loaders, random states.

    Works alone, and under `torch.distributed` with any mix of replicated, FSDP2 and tensor parallel modules;
    make it, restore and save on every rank then, after `init_process_group`. A state is nested dicts of such
    things and of plain values. What was saved by one world restores into another, of any size and layout.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        run: str = "run",
        every: int = 1,
        keep: str | Policy | Sequence[str | Policy] = (),
        memory: int = 0,
        options: Options | None = None,
    ) -> None:
        """Open the store at `url` (a path, file://, s3://, memory://) for the checkpoints of one run.

        Each `every`-th step is written, and kept as long as a policy of `keep` does (none: for ever); one or
        several, as values or as text ("latest:3"). With
        `memory` all steps are captured, and that many of the newest held in the keeper's memory, from where
        a new process on this host restores. Raises StoreRefused, StoreUnavailable.
        """
        self._options = Options() if options is None else options
        check_kind("options", self._options, Options)
        place = place_of(url)
        self._store = open_store(place)
        self._host_policy = host_policy_of(place, run, keep, every, memory=memory, options=self._options)
        self._every = every
        neighbours = Neighbours(self._options.parity, self._options.address, self._options.domain)
        check_neighbours(neighbours, memory)
        self._world = self._join()
        self._meeting = Meeting(self._world, neighbours)
        self._host: AnyHost | None = None
        self._saver: Saver | None = None
        self._damaged: tuple[Fallback, ...] = ()
        self._last = -1
        self._newest = self._world.tell(lambda: newest_in(self._store))  # which nobody has asked for yet
        self._may_inherit = has_keeper(self._host_policy, self._world)
        self._restored = -1
        self._in_the_way = ""
        self._savings: deque[Saving] = deque(maxlen=_MAX_REMEMBERED)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        cursor: Json = None,
        depth: Depth | None = None,
    ) -> Saving | None:
        """Save a step if it is due, and return at once; every rank does so, right after the same update.

        Large tensors are copied while the next forward and backward run; a torch optimizer waits for that by
        itself, anything else that changes the state calls `wait_captured` first. `metrics` are numbers that
        retention chooses the best by, `cursor` says, in plain JSON, where in the data the run is. `depth`
        "store" or "memory" overrides the cadence. Returns None if nothing was due.

        Raises `FormatError` for what cannot be stored, naming it; never for trouble with the store, which is
        logged, and told by the Saving. Raises ValueError for a step that is not newer than the last,
        Conflict if checkpoints of the store are in its way: they are another run's, or nobody restored them,
        or training went back (see `restore`); so if the keeper still writes what a predecessor captured.
        """
        step, metrics = plain_step(step), plain_metrics(metrics or {})
        self._check_way(step)
        depth = depth or self._due(step)
        if depth is None:
            return None
        if step <= self._last:
            raise ValueError(
                f"step {step} is not newer than step {self._last}, which was saved last: "
                "to go back, restore an older step first, or make another Checkpointer"
            )
        self._check_inheritance(step)
        with no_collection():
            captured = self._begin(step, state, {"metrics": metrics, "data_cursor": cursor}, depth)
        self._last = step
        saving = Saving(step, self._world.generation, captured, self._tiers_of(step, depth), self._look)
        self._savings.append(saving)
        if self._host_policy.hold:
            self._meeting.look(self._host)
        self._look()
        return saving

    def restore(
        self, state: Any, step: int | None = None, *, run: str | None = None, newer: Newer = "keep"
    ) -> Restoration | None:
        """Restore the newest whole checkpoint, or that of `step`, into the things of a state.

        Parameters and buffers are filled where they are; optimizers, schedulers and the like load their
        states; plain values are replaced in the dicts that hold them. Only what `state` names is read. In a
        world, every rank calls it, and all restore the same step. Returns None if there is no checkpoint.

        With an older `step` the newer ones stay, and `save` is refused, unless `newer="set aside"` moves
        their manifests out of the way, on all tiers; `notes` names them. A checkpoint of another run is
        refused unless `run` names it. What a predecessor on this host captured is waited for, for `flush_s`
        at most, until it is durable in the nearest store, unless memory has it; but a store that takes
        nothing any more only as long as a reader waits for one (`reading`), and `notes` says so.

        Raises Mismatch, naming what differs, for another model's checkpoint or another run's; NoCheckpoint if
        none is whole; Conflict if a tagged one would be set aside; StoreUnavailable if there is nothing, and
        what might have some does not answer, or cannot set it aside.
        """
        self.wait_captured()
        if step is not None:
            step = plain_step(step)
        policy, run = self._options.reading, run or self._host_policy.run
        with ExitStack() as pinned:
            held: list[Held] = []
            stores = self._sources()
            told = self._world.agreed(lambda: self._present(held, pinned, stores, (step, newer)))
            if len({one.asked for one in told}) > 1:
                raise Mismatch(
                    "the ranks ask for different steps: give every rank the same `step` and `newer`"
                )
            peers = pinned.enter_context(self._meeting.source([one.keepers for one in told]))
            own: list[Source] = [*(HeldSource(one, MEMORY) for one in held), *peers]
            sources, found = [*own, *stores], told[0].found
            left: tuple[str, ...] = ()
            if any(one.has_host for one in told):  # who may write until now what is not there yet
                left, found = self._settled(settled_before(own, step)), None
            if found is None:
                found = self._world.tell(lambda: find_steps(sources, policy, step))
            if isinstance(found, StoreUnavailable):
                raise found
            restored = restore_newest(state, sources, self._world, found, policy, run=run)
            if restored is not None:
                notes = (*left, *rebuilt_notes(peers, restored.step))
                restored = replace(restored, notes=(*restored.notes, *notes))
        self._damaged = () if restored is None else restored.report.fallbacks
        self._newest, self._may_inherit, self._in_the_way = None, False, ""
        self._restored = -1 if restored is None else restored.step
        if restored is not None and step is not None:
            restored = self._branched(restored, newer)
        if any(one.has_saved for one in told):
            self._world, self._last = self._join(), -1  # what was saved before is of another generation
            self._meeting = self._meeting.of(self._world)
        return restored

    def latest(self) -> int | None:
        """Return the newest step that is in the nearest store, None if there is none."""
        return Catalog(self._store).latest()

    def wait_captured(self) -> float:
        """Wait until the state may be changed again; return the seconds that took."""
        return 0.0 if self._saver is None else self._saver.wait_captured()

    def wait(self, timeout_s: float = 600.0) -> bool:
        """Wait until every save is durable in the nearest store or given up; False if time ran out."""
        is_over = self._saver is None or self._saver.drain(timeout_s)
        self._look()
        return is_over

    def close(self) -> None:
        """Wait until everything is durable, and leave. The keeper ends when its lease is over."""
        if self._saver is not None:
            if not self.wait(self._options.flush_s):
                log.error("left after %.0f s with checkpoints that are not durable", self._options.flush_s)
            self._saver.close()
        if self._host is not None:
            self._host.close()
        self._saver = self._host = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def world(self) -> World:
        """This process's place."""
        return self._world

    def _present(
        self, held: list[Held], pinned: ExitStack, stores: Sequence[Source], asked: tuple[int | None, Newer]
    ) -> "_Present":
        """Pin what is held here; return what the other ranks are to know of it."""
        self._host = self._host or find_host(self._host_policy, self._world)
        held.extend(pinned.enter_context(held_by(self._host)))
        found: Found | StoreUnavailable | None = None
        if self._world.rank == 0 and self._host is None and self._speaks_for_all():
            try:
                found = find_steps(stores, self._options.reading, asked[0])
            except StoreUnavailable as error:
                found = error
        return _Present(keepers_known_to(self._host), self._host is not None, self._last >= 0, asked, found)

    def _speaks_for_all(self) -> bool:
        """Whether nobody writes where one rank finds no host: on another host a keeper may still."""
        return self._host_policy.kept == "in this process" or len(set(self._world.hosts)) == 1

    def _join(self) -> World:
        apart = "r" if self._host_policy.kept == "in this process" else ""
        return join_world(self._store, apart=apart, host=self._options.host)

    def _due(self, step: int) -> Depth | None:
        if step % self._every == 0:
            return "store"
        return "memory" if self._host_policy.hold else None

    def _tiers_of(self, step: int, depth: Depth) -> tuple[str, ...]:
        memory: tuple[str, ...] = (MEMORY,) if self._host_policy.hold else ()
        parity = self._options.parity
        if parity is not None and self._meeting.is_wanted and step % parity.every == 0:
            memory = (MEMORY, PARITY)
        if depth == "memory":
            return memory
        return (NEAREST, *(tier.label for tier in self._options.tiers if is_due(tier, step)), *memory)

    def _check_way(self, step: int) -> None:
        """Raise Conflict if a step is taken, or could not be told from what another branch or run left."""
        if self._in_the_way:
            raise Conflict(self._in_the_way)
        if self._newest is not None:
            check_first(self._newest, self._store, self._host_policy.run, step)
        if step < self._restored:
            raise Conflict(f"step {step} is not newer than step {self._restored}, which was restored")

    def _check_inheritance(self, step: int) -> None:
        """Raise Conflict if the first save meets what a predecessor captured, wherever that has come to."""
        if not self._may_inherit:
            return
        self._host = self._host or find_host(self._host_policy, self._world)
        if self._host is not None:
            check_unfinished(self._host.settle(step - 1, 0.0, patience_s=0.0), step)
        try:
            newest = newest_in(self._store)  # it may have been finished since this was made
        except StoreError as error:
            log.warning("whether a predecessor's last step is durable by now is unknown: %s", error)
        else:
            if newest is not None:
                check_first(newest, self._store, self._host_policy.run, step)
        self._may_inherit = False

    def _settled(self, above: int) -> tuple[str, ...]:
        """Wait for what was captured before, here and on other hosts; note what is not durable after that."""
        timeout_s, patience_s = self._options.flush_s, self._options.reading.empty_patience_s
        left = settle(self._host, above, self._world, timeout_s=timeout_s, patience_s=patience_s)
        if not left:
            return ()
        log.error("%s", told_unsettled(left))
        return (told_unsettled(left),)

    def _stores(self) -> dict[str, Store]:
        return {NEAREST: self._store, **{tier.label: open_store(tier.url) for tier in self._options.tiers}}

    def _sources(self) -> list[Source]:
        return [StoreSource(store, name) for name, store in self._stores().items()]

    def _branched(self, restored: Restoration, newer: Newer) -> Restoration:
        """Look for checkpoints newer than the one that was asked for, and do with them as was said."""
        step, stores, policy = restored.step, self._stores(), self._options.reading
        silent = restored.report.unreached
        if newer == "set aside":
            self._in_the_way = told_kept(step)  # if that fails
            self._world.everybody(None)  # what other ranks have under way is over
            gone = self._world.tell(lambda: abandon(stores, step, policy, silent))
            self._in_the_way = ""
            notes = [told_abandoned(gone, step)] if gone else []
        else:
            ahead = self._world.tell(lambda: newer_steps(stores, step, policy, silent))
            self._in_the_way = told_kept(step, ahead.steps) if ahead.steps else ""
            notes = [self._in_the_way] if ahead.steps else []
            notes += [told_unknown(ahead.unreached, step)] if ahead.unreached else []
        for note in notes:
            log.warning("%s", note)
        return replace(restored, notes=(*restored.notes, *notes))

    def _saver_for(self, tree: Any) -> Saver:
        if self._saver is None:
            self._host = self._host or open_host(self._host_policy, self._store, self._world, tree)
            self._saver = Saver(self._host, self._host_policy.run, self._options.saving)
        return self._saver

    def _begin(self, step: int, state: Any, meta: Mapping[str, Any], depth: Depth) -> "Future[None]":
        tree = to_tree(state)
        saver = self._saver_for(tree)
        self._make_way()
        return saver.save(step, tree, self._world.share, meta, depth=depth)

    def _make_way(self) -> None:
        """Set aside, once, the checkpoints that could not be restored: their steps are to come again."""
        damaged, self._damaged = self._damaged, ()
        for one in damaged if self._world.rank == 0 else ():
            try:
                if set_aside(self._store, one.step, one.why):
                    log.warning("the damaged checkpoint of step %d was set aside", one.step)
            except StoreError as error:
                log.warning("the damaged checkpoint of step %d stays in the way: %s", one.step, error)

    def _look(self) -> None:
        """Learn what became of saves, and say what went wrong."""
        for outcome in () if self._saver is None else self._saver.outcomes():
            _tell(outcome)
            for saving in self._savings:
                if (saving.step, saving.generation) == (outcome.step, outcome.generation):
                    saving.note(outcome)
                elif isinstance(outcome, Durable | Failed) and outcome.tier == PARITY:
                    saving.note_passed(outcome)


@dataclass(frozen=True, slots=True)
class _Present:
    """What a rank tells before a restore: the keepers it knows, if one lives here, if it saved in this world.

    Rank 0 also tells the steps that the stores have, if it is known that nobody still writes some.
    """

    keepers: str
    has_host: bool
    has_saved: bool
    asked: tuple[int | None, Newer]
    found: Found | StoreUnavailable | None


def _tell(outcome: Outcome) -> None:
    if not isinstance(outcome, Durable):
        where = f" on {outcome.tier}" if isinstance(outcome, Failed) and outcome.tier else ""
        level = logging.INFO if OVERTAKEN in outcome.why else logging.ERROR
        log.log(level, "step %d is not checkpointed%s: %s", outcome.step, where, outcome.why)
