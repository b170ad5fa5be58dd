"""What happens to checkpoints after their commit: copied to far tiers when due, and pruned, tier by tier.

Every tier has a thread of its own, so that a slow or failing one holds up no other, and never a save. What is
due is found by comparing what the tiers have: nothing is remembered, so nothing is lost with the process.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from checkpoint.engine.contract import MEMORY, PARITY, Durable, Outcome
from checkpoint.engine.intake import Intake
from checkpoint.errors import CheckpointError
from checkpoint.keeper.far import FarTier, Graces, prune_logged
from checkpoint.lifecycle.policies import Pinned, Policy
from checkpoint.lifecycle.tiers import Tier, check_tiers
from checkpoint.store.contract import Store
from checkpoint.store.open import open_store
from checkpoint.store.wrappers import Retrying, RetryPolicy

log = logging.getLogger("holdfast.keeper")

_MAX_REMEMBERED = 256
_SAVES_OF_GRACE = 3.0  # a prune leaves alone what is younger than so many of the slowest save


@dataclass(frozen=True, slots=True)
class UpkeepPolicy:
    """Looks at the tiers after each commit, and every `poll_s` besides.

    A far store that fails is asked again as `retry` says, and anew at the next look. Prunes have this grace
    and linger (see `lifecycle.prune`), or longer ones if saves are slow. With a `run` no other's
    checkpoints are copied or pruned.
    """

    poll_s: float = 60.0
    grace_s: float = 3600.0
    linger_s: float = 60.0
    run: str | None = None
    retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(600.0, 0.5, 30.0))


@dataclass(eq=False, slots=True)
class _Chore:
    """Something to do after each commit; `num_seen` commits were dealt with, the last time without a rest."""

    name: str
    act: Callable[[], None]
    num_seen: int = 0


class Upkeep:
    """Looks after the checkpoints of one host's pipeline, as long as that host leads its world."""

    def __init__(
        self,
        near: Store,
        intake: Intake,
        tiers: Sequence[Tier] = (),
        keep: Sequence[Policy] = (),
        policy: UpkeepPolicy | None = None,
        open_tier: Callable[[str], Store] = open_store,
    ) -> None:
        check_tiers(tiers)
        self._near = near
        self._intake = intake
        self._keep = tuple(keep)
        self._policy = policy or UpkeepPolicy()
        self._changed = threading.Condition()
        self._num_commits = 1  # what is there already counts as one
        self._is_closed = False
        self._slowest_s = 0.0
        self._began_s: dict[int, float] = {}
        self._far = [
            FarTier(near, tier, self._patient(open_tier(tier.url)), intake.board.tell, run=self._policy.run)
            for tier in tiers
        ]
        self._chores = [_Chore(far.name, partial(self._tend, far)) for far in self._far]
        if self._keep:
            self._chores.append(_Chore("near", self._prune_near))
        intake.board.watch(self._note)
        for chore in self._chores:
            work = partial(self._keep_doing, chore)
            threading.Thread(target=work, name="holdfast-upkeep", daemon=True).start()

    @property
    def num_undone(self) -> int:
        """How many tiers have not been looked after since the last commit."""
        with self._changed:
            return sum(chore.num_seen != self._num_commits for chore in self._chores)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every tier has been looked after since the last commit; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(chore.num_seen == self._num_commits for chore in self._chores), timeout_s
            )

    def close(self) -> None:
        """Stop; what is under way to a far tier is broken off, and resumed by who comes next."""
        self._intake.board.unwatch(self._note)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _patient(self, store: Store) -> Store:
        return Retrying(store, self._policy.retry, may_go_on=lambda: not self._is_closed)

    def _note(self, outcome: Outcome) -> None:
        others = {MEMORY, PARITY, *(far.name for far in self._far)}
        if not isinstance(outcome, Durable) or outcome.tier in others:
            return
        with self._changed:
            self._num_commits += 1
            self._slowest_s = max(self._slowest_s, outcome.seconds)
            self._began_s[outcome.step] = time.monotonic() - outcome.seconds
            while len(self._began_s) > _MAX_REMEMBERED:
                del self._began_s[min(self._began_s)]
            self._changed.notify_all()

    def _keep_doing(self, chore: _Chore) -> None:
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or chore.num_seen < self._num_commits, self._policy.poll_s
                )
                num_commits = self._num_commits
            if self._intake.leads and not self._is_closed:
                self._do(chore)
            with self._changed:
                chore.num_seen = num_commits
                self._changed.notify_all()

    def _do(self, chore: _Chore) -> None:
        try:
            chore.act()
        except CheckpointError as error:
            log.warning("tier %s was not looked after: %s", chore.name, error)
        except Exception:
            log.exception("tier %s was not looked after", chore.name)  # the thread's border

    def _tend(self, far: FarTier) -> None:
        try:
            far.look()
        except CheckpointError as error:
            far.give_up(error)
            raise
        while not self._is_closed and (missing := far.missing()):
            newest = missing[0]
            if not far.bring(newest, self._began_s.get(newest.step, time.monotonic())):
                break  # until the next look
        far.prune(self._graces())

    def _prune_near(self) -> None:
        """Prune the near store, but for what a far tier still lacks."""
        lacking = {manifest.step for far in self._far for manifest in far.missing()}
        policies = (*self._keep, Pinned(frozenset(lacking))) if lacking else self._keep
        prune_logged(self._near, policies, self._graces(), "near")

    def _graces(self) -> Graces:
        least_s = _SAVES_OF_GRACE * self._slowest_s
        grace_s, linger_s = max(self._policy.grace_s, least_s), max(self._policy.linger_s, least_s)
        return Graces(grace_s, linger_s, self._policy.run)
