"""The training loop, read from top to bottom. Knows no processes, network or storage, only their ports."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from checkpoint import Loaded, Saver, Share
from elastic.control.dealing import Dealing, deal_rest
from elastic.control.events import Ending, Event, LossJumped, ReplicaHealed, StepCommitted, StepSkipped
from elastic.control.guard import LossWatch, why_not_finite
from elastic.control.standing import BLANK, Settlement, Standing, settle
from elastic.errors import ReplicasDiffer
from elastic.training.blame import UserFailure, blaming_the_job
from elastic.training.carrying import check_carried
from elastic.training.exchange import agree, gather_standings
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.job import Job, Split
from elastic.training.layout import lay_out
from elastic.training.pace import Pace
from elastic.training.parting import lets_go
from elastic.training.plan import TrainPlan
from elastic.training.ports import Broken, Emit, Flags, Orders, World
from elastic.training.randomness import keyed, make_deterministic, seed_for
from elastic.training.replicas import Replicated
from elastic.training.saving import Snapshots, describe, origin_of, sources_of
from elastic.training.state import Learner, StateLost, first_model
from elastic.training.untouched import leaving_state_alone
from elastic.training.watching import Disputed, ReplicaWatch

_DRAIN_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Settling:
    """How this member came to hold the world's state: `step` committed steps, from `source`, in `seconds`."""

    step: int
    source: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where snapshots go (None: nowhere), and how to get the newest checkpoint (None, or returning None: the
    first state comes from the seed).
    """

    saver: Saver | None = None
    restore: Callable[[], Loaded | None] | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The step whose reduced gradients this member holds, or held last."""

    generation: int = 0
    loss: float = float("nan")
    started: float = 0.0
    blocked_s: float = 0.0
    is_refused: bool = False
    is_last: bool = False


class Trainer:
    """One member's training, through as many worlds as it takes. Keeps no world between calls."""

    def __init__(
        self, job: Job, settings: Any, plan: TrainPlan, *, member: str, device: torch.device, storage: Storage
    ) -> None:
        if plan.determinism == "bitwise":
            make_deterministic(device)
        self._job, self._plan, self._member, self._device = job, plan, member, device
        split = Split(
            name="train", source=plan.source, seed=plan.seed, micro_batch=plan.micro_batch, settings=settings
        )
        self._pace = Pace(device)
        self._settings = settings
        self._standing = Standing(BLANK)
        with blaming_the_job(0):
            self._dataset = job.dataset(split)
            learner = self._first_learner()
        self._learner, self._reduction = lay_out(
            learner, self._learner_of, plan, device=device, waiting=self._pace.waiting
        )
        check_carried(self._learner.tree(0))
        self._is_first_update = True
        self._restore = storage.restore
        self._snapshots = Snapshots(storage.saver, member, origin_of(job, plan))
        self._has_begun = False
        self._attempt = _Attempt()
        self._dealing: Dealing | None = None  # of the step that a lost rank interrupted
        self._loss_watch = LossWatch()
        self._replica_watch = ReplicaWatch(member, device)
        self._num_tokens = 0
        self._untold: list[Event] = []

    @property
    def standing(self) -> Standing:
        """Where this member stands: what it would contribute to a new world."""
        return self._standing

    @property
    def activity(self) -> tuple[float, bool]:
        """How long the present micro-batch takes already, and whether nothing can be done before there is
        room in the host's arena. May be asked by any thread.
        """
        return self._pace.working_s, self._snapshots.is_waiting_for_room

    @property
    def model(self) -> nn.Module:
        """The model, as of the last committed step."""
        return self._learner.model

    def weights_sha256(self) -> str:
        """Hash the model as of the last committed step; all ranks of a world have to. Raises Broken."""
        with blaming_the_job(max(self._standing.committed, 0)):
            return self._learner.weights_sha256()

    @property
    def is_whole(self) -> bool:
        """Whether this member holds all of the state."""
        return self._learner.is_whole

    def save_alone(self, generation: int, host: str) -> bool:
        """Save the state of which all is here as a world of one; return whether it became durable."""
        alone = Share(generation, 0, 1, (host,))
        self._snapshots.save(alone, self._standing.committed, self._learner.whole_tree)
        return self._snapshots.drain(self._plan.save_s) and self._snapshots.why_newest_lost() is None

    @lets_go
    def settle(self, world: World, leaving: Collection[int] = ()) -> Settling:
        """Come to one committed step and state, as all ranks of the world; leaving ranks give theirs away.

        Raises Broken; this member then stands where it stood, or one step further. Raises `Mismatch` for
        another model's checkpoint.
        """
        started = time.perf_counter()
        standings, held = gather_standings(
            world, self._standing, self._reduction.held(), self._plan.virtual_ranks
        )
        settlement = settle(standings)
        if world.rank in settlement.appliers:
            self._commit()
        healed = self._compare_survivors(world, settlement)
        parcel = Parcel(None, "self")
        if settlement.step == BLANK and world.rank == settlement.source:
            parcel = self._begin()
        if world.rank == settlement.source and settlement.receivers:
            state = self._learner.tree(self._standing.committed)
            hand_over(
                world, sorted(settlement.receivers), Parcel(state, parcel.origin, parcel.note), self._device
            )
        source = parcel.origin
        if world.rank in settlement.receivers:
            parcel = accept(world, settlement.source, self._device)
            source = "peer" if parcel.origin == "self" else parcel.origin
            self._take_over(parcel.state)
        if parcel.origin == "store":  # of what memories gave the store may lack the step
            self._snapshots.hold(world.generation, self._standing.committed)
        try:
            num_taken = self._learner.settle(world, leaving)
        except StateLost as lost:
            self._give_up(world, str(lost))
        up_to_date = [rank for rank, each in enumerate(standings) if each.committed == settlement.step]
        self._deal_rest([held[r] if r in up_to_date and r not in healed else () for r in range(world.size)])
        source = "self+peer" if source == "self" and num_taken else source
        self._standing = Standing(self._standing.committed)  # gradients of rows that moved are gone
        return Settling(self._standing.committed, source, time.perf_counter() - started, parcel.note)

    @lets_go
    def run(self, world: World, orders: Orders, emit: Emit) -> Ending:
        """Train until the plan's end, a request to stop, or a boundary at which a newer world is to form.

        Raises Broken when the world ends before, `UserFailure` when the job's code does.
        """
        if self._plan.is_saved(self._standing.committed):
            self._save(world)  # the world before may have died before all of its ranks had saved
        while self._standing.committed < self._plan.num_steps:
            agreed = self._step(world, orders)
            is_saved = self._plan.is_saved(self._standing.committed) or agreed.stop
            is_last = self._plan.compare_every and agreed.stop
            is_compared = self._plan.is_compared(self._standing.committed) or is_last
            if is_compared and self._compare(world, self._learner.replicas()):
                self._learner.complete(world)
            if is_saved:
                self._save(world)
            self._tell(emit)
            if agreed.stop:
                return self._finish(world, orders, emit, Ending.STOPPED)
            if agreed.next_generation > world.generation:
                return Ending.REGROUP
        return self._finish(world, orders, emit, Ending.FINISHED)

    @lets_go
    def save_and_stop(self, world: World, orders: Orders, emit: Emit) -> Ending:
        """Save the state as it is, and stop; or finish, if it is that of the last step. A newer world may
        form before it is durable. Raises Broken when the world ends before, or could not save.
        """
        if self._plan.compare_every and self._compare(world, self._learner.replicas()):
            self._learner.complete(world)
        if self._standing.committed > 0:  # what the seed gives needs no saving
            self._save(world)
        is_done = self._standing.committed >= self._plan.num_steps
        return self._finish(world, orders, emit, Ending.FINISHED if is_done else Ending.STOPPED)

    def _first_learner(self) -> Learner:
        """Make the state that the seed gives."""
        model = first_model(self._job, self._settings, self._plan.seed)
        return self._learner_of(model if self._plan.parameter_copies else model.to(self._device))

    def _learner_of(self, model: nn.Module) -> Learner:
        with blaming_the_job(max(self._standing.committed, 0)):
            return Learner(self._job, model, self._plan.seed, self._plan.num_steps)

    def _step(self, world: World, orders: Orders) -> Flags:
        """Commit one step, on all ranks or on none; return what the ranks agreed to do after it."""
        started, step = time.perf_counter(), self._standing.committed
        self._standing = Standing(step)  # gradients still held from a lost attempt are given up now
        dealt = self._dealing or self._pace.deal(self._plan.virtual_ranks, world.size)

        def leaf(virtual_rank: int) -> Tensor:
            orders.check(world.generation)  # what is held by now is still good in the world after it
            with self._pace.measured():
                return self._leaf(virtual_rank)

        loss = self._reduction.reduce(world, dealt, leaf)
        norm = self._reduction.clip(inf if self._plan.grad_clip is None else self._plan.grad_clip)
        is_refused = self._guard(world, loss, norm)
        # Capture ends before the agreement: after it, survivors may go past what a lost member still owes.
        blocked_s = self._snapshots.wait_captured()
        self._attempt = _Attempt(world.generation, loss, started, blocked_s, is_refused)
        self._standing = Standing(step, reduced=step)
        agreed, everyones_us = agree(world, orders.pending(), self._pace.mine_us)
        self._pace.learn(everyones_us)
        self._attempt = replace(self._attempt, is_last=bool(agreed.stop))
        self._commit()  # all ranks hold the gradients now: whoever survives can apply them
        self._learner.complete(world)
        return agreed

    def _guard(self, world: World, loss: float, norm: float) -> bool:
        """Return whether the step must not be applied, or raise UserFailure; every rank sees the same."""
        step = self._standing.committed
        told: list[Event] = []
        why = why_not_finite(loss, norm)
        if why is not None and self._plan.when_not_finite == "fail":
            advice = 'nothing of it was applied; mend the job, or set training.when_not_finite = "skip"'
            raise UserFailure(step, -1, f"{why}; {advice}", "")
        if why is not None:
            told.append(StepSkipped(self._member, world.generation, step, why))
        elif (usual := self._loss_watch.look(loss)) is not None:
            told.append(LossJumped(self._member, world.generation, step, loss, usual))
        self._untold.extend(told if world.rank == 0 else [])
        return why is not None

    def _leaf(self, virtual_rank: int) -> Tensor:
        """Add the gradient of one virtual rank's micro-batch to the bound row; return its loss."""
        step = self._standing.committed
        key = seed_for(self._plan.seed, step, virtual_rank)
        with blaming_the_job(step, virtual_rank), keyed(key, self._device) as rng:
            batch = self._job.batch(self._dataset, step, virtual_rank)
            with leaving_state_alone(self.model):
                loss = self._job.loss(self.model, batch, rng)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            count = getattr(self._job, "tokens", None)
            self._num_tokens = int(count(batch)) if count is not None else self._plan.micro_batch
        return loss.detach()

    def _commit(self) -> None:
        """Apply the reduced gradients this member holds. Asks nobody: a broken world cannot interrupt it."""
        blocked_s = self._attempt.blocked_s + self._snapshots.wait_captured()
        if not self._attempt.is_refused:
            self._update()
        self._standing = Standing(self._standing.committed + 1)
        if self._is_first_update and not self._attempt.is_refused:  # which makes the optimizer's state
            check_carried(self._learner.tree(self._standing.committed))
            self._is_first_update = False
        self._reduction.forget()
        self._dealing = None
        self._untold.append(
            StepCommitted(
                member=self._member,
                generation=self._attempt.generation,
                step=self._standing.committed,
                loss=self._attempt.loss,
                seconds=time.perf_counter() - self._attempt.started,
                tokens=self._num_tokens * self._plan.virtual_ranks,
                blocked_s=blocked_s,
                is_last=self._attempt.is_last,
            )
        )

    def _update(self) -> None:
        try:
            with blaming_the_job(self._standing.committed):
                self._learner.update()
        except BaseException:
            self._standing = Standing(BLANK)  # some of the state is that of a step more
            raise

    def _give_up(self, world: World, why: str) -> NoReturn:
        """Leave the state to the next world, which restores it from a checkpoint."""
        self._forget()
        raise Broken(world.generation, why)

    def _forget(self) -> None:
        """Hold no state any more."""
        self._snapshots.wait_captured()
        self._reduction.forget()  # the next state may be of another step, or the first
        self._standing = Standing(BLANK)

    def _compare(self, world: World, replicas: Sequence[Replicated]) -> frozenset[int]:
        """Find ranks whose copies of state hold other bits than the majority's, heal and return them.

        Without a majority nobody's state can be trusted: raises Broken, and the next world restores; or
        ReplicasDiffer, after which one still saves what it restores.
        """
        step = self._standing.committed
        try:
            found = self._replica_watch.look(world, step, replicas, self._snapshots.wait_captured)
        except Disputed as disputed:
            self._give_up(world, str(disputed))
        except ReplicasDiffer:
            self._forget()
            raise
        if found.corrupt:
            self._untold.append(ReplicaHealed(self._member, world.generation, step, found.corrupt))
        return found.healed

    def _compare_survivors(self, world: World, settlement: Settlement) -> frozenset[int]:
        """Let those who hold state compare it before it is saved, or given to those who hold none; return
        who was healed, and gave up the gradients that it had computed.
        """
        step, plan = settlement.step, self._plan
        is_moved = plan.compare_every and (plan.is_sharded or settlement.receivers)
        if step == BLANK or not (is_moved or plan.is_compared(step)):
            return frozenset()
        is_blank = world.rank in settlement.receivers
        healed = self._compare(world, () if is_blank else self._learner.replicas())
        if world.rank in healed:
            self._reduction.forget()
        return healed

    def _deal_rest(self, held: list[Sequence[int]]) -> None:
        """Deal the interrupted step so that nothing that survived is computed again; the pace begins anew."""
        self._pace.forget_others()
        self._dealing = deal_rest(self._plan.virtual_ranks, held) if any(held) else None

    def _begin(self) -> Parcel:
        """Make the first state: the newest checkpoint if there is one, else what the seed gave."""
        loaded = self._restore() if self._restore is not None else None
        if loaded is None:
            if self._has_begun:  # what is here is not the first state any more, nor all of it perhaps
                self._learner.load(self._first_learner().tree(0))
            self._has_begun = True
            self._standing = Standing(0)
            return Parcel(None, "fresh")
        self._take_over(loaded.state)
        return Parcel(None, sources_of(loaded), describe(loaded))

    def _take_over(self, state: Any) -> None:
        self._forget()  # in between it is neither the old state nor the new one
        self._has_begun = True
        self._standing = Standing(self._learner.load(state))

    def _save(self, world: World) -> None:
        share = Share(world.generation, world.rank, world.size, world.hosts)
        self._snapshots.save(share, self._standing.committed, self._learner.shares)

    def _finish(self, world: World, orders: Orders, emit: Emit, ending: Ending) -> Ending:
        """Wait until the last checkpoint is durable, or a newer world (it saves again) is to form.

        Raises Broken if it was lost or is late: the state is still here, and a newer world saves it again.
        """
        self._snapshots.wait_captured()
        deadline = time.monotonic() + self._plan.save_s
        while not self._snapshots.drain(_DRAIN_POLL_S):
            self._tell(emit)
            if time.monotonic() > deadline:
                late = f"the final checkpoint is not durable after {self._plan.save_s:g} s"
                raise Broken(world.generation, late)
            if orders.pending().next_generation > world.generation:
                return Ending.REGROUP
        why = self._snapshots.why_newest_lost()
        self._tell(emit)
        if why is not None:
            raise Broken(world.generation, f"the final checkpoint was lost: {why}")
        return ending

    def _tell(self, emit: Emit) -> None:
        """Emit what happened since the last time."""
        untold, self._untold = [*self._untold, *self._snapshots.news()], []
        for event in untold:
            emit(event)
