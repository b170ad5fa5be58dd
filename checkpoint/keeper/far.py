"""One far tier: what is due there and missing is brought there, and what has expired is pruned."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoint.engine.contract import Durable, Failed, Outcome
from checkpoint.errors import CheckpointError, Conflict, FormatError, NoCheckpoint
from checkpoint.format.manifest import Manifest
from checkpoint.lifecycle.policies import Candidate, Policy, judge
from checkpoint.lifecycle.promotion import promote
from checkpoint.lifecycle.retention import prune
from checkpoint.lifecycle.survey import list_manifests, objects_of, survey
from checkpoint.lifecycle.tiers import Tier, is_due
from checkpoint.store.contract import Entry, Store

log = logging.getLogger("holdfast.keeper")


@dataclass(frozen=True, slots=True)
class Graces:
    """What a prune leaves alone: see `lifecycle.prune`."""

    grace_s: float
    linger_s: float
    run: str | None


class FarTier:
    """Brings a run's checkpoints from the near store to a far one, and says so once for each."""

    def __init__(
        self,
        near: Store,
        tier: Tier,
        store: Store,
        tell: Callable[[Outcome], None],
        *,
        run: str | None = None,
    ) -> None:
        self._near = near
        self._tier = tier
        self._store = store
        self._tell = tell
        self._run = run  # whose checkpoints are meant; None: all
        self._here: dict[int, Candidate] = {}
        self._failed: set[tuple[int, int]] = set()
        self._listed: dict[int, Entry] = {}
        self._hopeless: dict[int, Entry | None] = {}  # as it was listed near: one saved anew has a new chance

    @property
    def name(self) -> str:
        """What the tier is called."""
        return self._tier.label

    def look(self) -> None:
        """Find out what is here; the far store has to answer for that."""
        found = survey(self._store).standing
        self._here = {
            step: _candidate(one.manifest) for step, one in found.items() if self._is_ours(one.manifest)
        }

    def give_up(self, error: CheckpointError) -> None:
        """Say, if there is something to bring here, that the tier did not answer."""
        for manifest in self.missing()[:1]:
            self._fail(manifest, error)

    def missing(self) -> list[Manifest]:
        """List the checkpoints that are due here, were not here at the last look, and would be kept; the
        newest first."""
        self._listed = list_manifests(self._near)
        due = {step for step in self._listed if is_due(self._tier, step)}
        hopeless = {step for step, entry in self._hopeless.items() if self._listed.get(step) == entry}
        if not due - self._here.keys() - hopeless:
            return []
        near = {
            step: one.manifest
            for step, one in survey(self._near).standing.items()
            if self._is_ours(one.manifest)
        }
        found = {step: near[step] for step in due & near.keys() - self._here.keys()}
        candidates = [*self._here.values(), *map(_candidate, found.values())]
        kept = {one.step for one in judge(candidates, self._tier.policies) if one.is_kept}
        return [found[step] for step in sorted(found.keys() & kept - hopeless, reverse=True)]

    def bring(self, manifest: Manifest, since_s: float) -> bool:
        """Copy a checkpoint here; return whether it is here now. Never raises what may happen to a store."""
        try:
            report = promote(self._near, self._store, manifest.step)
        except NoCheckpoint:
            return False  # it expired on the near tier meanwhile
        except CheckpointError as error:
            if isinstance(error, Conflict | FormatError):
                self._hopeless[manifest.step] = self._listed.get(
                    manifest.step
                )  # asking again changes nothing
            self._fail(manifest, error)
            return False
        self._failed.discard((manifest.generation, manifest.step))
        self._here[manifest.step] = _candidate(manifest)
        seconds = time.monotonic() - since_s
        self._tell(Durable(manifest.step, manifest.generation, self.name, report.num_bytes, seconds))
        return True

    def prune(self, graces: Graces) -> None:
        """Let go what the tier's policies do not keep."""
        prune_logged(self._store, self._tier.policies, graces, self.name)

    def _is_ours(self, manifest: Manifest) -> bool:
        return self._run in (None, manifest.run)

    def _fail(self, manifest: Manifest, error: CheckpointError) -> None:
        log.warning("step %d did not come to tier %s: %s", manifest.step, self.name, error)
        if (manifest.generation, manifest.step) not in self._failed:
            self._failed.add((manifest.generation, manifest.step))
            why = f"{type(error).__name__}: {error}"
            self._tell(Failed(manifest.step, manifest.generation, why, self.name))


def prune_logged(store: Store, policies: Sequence[Policy], graces: Graces, name: str) -> None:
    """Prune a store, and log what that did. Never raises what may happen to a store."""
    try:
        report = prune(
            store,
            policies,
            now_s=time.time(),
            grace_s=graces.grace_s,
            linger_s=graces.linger_s,
            run=graces.run,
        )
    except CheckpointError as error:
        log.warning("tier %s was not pruned: %s", name, error)
        return
    for problem in report.problems:
        log.warning("tier %s: %s", name, problem)
    if report.removed:
        log.info("tier %s: pruned steps %s, %d bytes", name, list(report.expired), report.num_bytes)


def _candidate(manifest: Manifest) -> Candidate:
    objects = {ref.key: ref.num_bytes for ref in objects_of(manifest)}
    return Candidate(manifest.step, manifest.created_utc, manifest.metrics, objects)
