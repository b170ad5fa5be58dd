"""The controller: events in, instructions out. It knows no process, no clock and no network.

A world goes GATHERING -> FORMING -> TRAINING; a loss leads back to FORMING, a joiner at a step boundary; a
request to stop to ENDED, through one last checkpoint. What belongs to an older generation is ignored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from elastic.control.attendance import Attendance, OfWorld, Stage
from elastic.control.diagnosis import Blamed, Diagnosis, Stalled
from elastic.control.events import (
    Cause,
    Ending,
    Event,
    GenerationTaken,
    MemberBuilding,
    MemberCame,
    MemberEnded,
    MemberFailed,
    MemberLeaving,
    MemberLost,
    MemberReady,
    ReplicaHealed,
    Settled,
    StepCommitted,
    StopRequested,
    Tick,
    UserFailed,
    WorkersWanted,
    WorldBroken,
)
from elastic.control.instructions import (
    End,
    FormWorld,
    Instruction,
    KillMember,
    Manner,
    ReleaseMember,
    StartMember,
    Status,
    StopWorld,
)
from elastic.control.losses import Losses
from elastic.control.membership import Membership
from elastic.control.phase import Phase
from elastic.control.policy import Action, Decision, Waiting, WorldPolicy, resized
from elastic.control.starts import HASTE_S, Starts
from elastic.control.succession import decide, find_unneeded, has_reason, is_left_to_store
from elastic.control.waking import WakingClock


@dataclass(slots=True)
class Controller:
    """Decides which world forms next, from what happened.

    `generation` is the newest one claimed so far (0: none), `formed` the newest that this controller formed:
    what is told of an earlier driver's world is not about ours. `prefix` names this controller's members. No
    world has more than `most_ranks`; no step comes after `last_step`. Of each shard of the state there are
    `copies` (0: all hold all of it).
    """

    policy: WorldPolicy
    prefix: str
    generation: int = 0
    formed: int = 0
    most_ranks: int = 1 << 30
    last_step: int = 1 << 62
    copies: int = 0
    phase: Phase = Phase.GATHERING
    members: Membership = field(init=False)
    roll: Attendance = field(init=False)
    diagnosis: Diagnosis = field(init=False)
    losses: Losses = field(default_factory=Losses)
    stopping: str | None = None
    _ends_as: Status = Status.STOPPED
    _settled: int = 0  # the generation that did last
    _least: int = field(init=False)
    _is_broken: bool = True
    _is_parting: bool = False  # all will be taken away: the world saves what it holds, and who leaves may go
    _ordered: FormWorld = field(init=False)
    _starts: Starts = field(default_factory=Starts)
    _begun_at: float = 0.0
    _idle_since: float = 0.0
    _clock: WakingClock = field(default_factory=WakingClock)

    def __post_init__(self) -> None:
        self.diagnosis, self.roll = Diagnosis(self.policy), Attendance(last_step=self.last_step)
        self.members = Membership(self.prefix)
        self._least = self.policy.min_workers

    def begin(self, found: Iterable[str], now: float) -> list[Instruction]:
        """Start the run: `found` members are alive already (an earlier driver's); start what is missing."""
        self._begun_at = self._idle_since = now = self._clock.read(now)
        self.members.expect(sorted(found), now + self.policy.found_s)
        return list(self._replenish(now))

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; return what to do about it, in order."""
        now = self._clock.read(now)
        if self.phase is Phase.ENDED:
            return []
        match event:
            case MemberReady():
                return self._welcome(event, now)
            case MemberBuilding(member):
                self.members.build(member, now + self.policy.start_s)
                return self._consider(now)
            case MemberLost():
                return self._lose(event, now)
            case MemberFailed(member, evidence):
                return self._evict(member, Cause.FAILED, evidence, now)
            case ReplicaHealed(member=member, step=step):
                why = self.losses.heal(member, step) if self.members.knows(member) else None
                return self._evict(member, Cause.FAILED, why, now) if why else []
            case UserFailed(member=member) if self.members.knows(member) and self.losses.is_news(event):
                return self._refuse(event, now)
            case MemberLeaving(member, notice):
                return self._part(member, notice, now)
            case WorkersWanted(workers):
                return self._resize(workers, now)
            case StopRequested(reason):
                return self._stop(reason, now)
            case Tick():
                self._starts.relax(by=now - HASTE_S)
                return self._wait(event, now)
            case GenerationTaken(generation) if generation == self.formed:
                self.generation = self.formed = self.generation + 1
                self._ordered = replace(self._ordered, generation=self.formed)
                return [self._ordered]
        return self._hear(event, now) if isinstance(event, OfWorld) else []

    def _welcome(self, ready: MemberReady, now: float) -> list[Instruction]:
        if self.members.admit(ready):
            self.diagnosis.welcome(ready.member)
            self._starts.succeed()
        return self._consider(now)

    def _hear(self, event: OfWorld, now: float) -> list[Instruction]:
        """Take an event of a world; but for what can be learned from it, only the present one's counts."""
        self.diagnosis.learn(event)
        if isinstance(event, WorldBroken) and event.is_blank:
            self._blank(event)
        if event.generation != self.formed:
            return []
        self.roll.take(event, now)
        match event:
            case MemberCame(member=member) if self.roll.manner is Manner.AT_ONCE:
                self.diagnosis.learn_of_coming(member, self.roll.ordered_at, now)
            case Settled(seconds=seconds):
                self.diagnosis.learn_of_settling(self.roll, seconds)
                return self._settle(now)
            case StepCommitted():
                self.losses.num_in_a_row = self.diagnosis.num_stalls = 0
                self._starts.relax(by=now)
                return [*self._settle(now), *self._replenish(now)]
            case MemberEnded() if self.roll.have_ended(self.members.world):
                return self._conclude(now)
        return []

    def _blank(self, broken: WorldBroken) -> None:
        """A member has given its state up, and has got none in a world that settled since."""
        if broken.generation >= self._settled and self.members.blank(broken.member):
            self.diagnosis.expect_restore(broken.member)
            self.roll.origin = self.members.origin

    def _evict(self, member: str, cause: Cause, evidence: str, now: float) -> list[Instruction]:
        """End a member, and go on as if it had died."""
        return [KillMember(member, evidence, cause), *self._lose(MemberLost(member, cause, evidence), now)]

    def _lose(self, lost: MemberLost, now: float) -> list[Instruction]:
        if not self.members.knows(lost.member):
            return []
        was_in_world = self.members.is_ranked(lost.member)
        was_expected = not was_in_world and lost.member in self.members.leaving
        was_starting = self.members.drop(lost.member)
        self.diagnosis.forget(lost.member)
        if was_expected:
            return []
        if was_starting:
            self._starts.fail(now)
        is_missed = self._is_broken or not was_starting  # else others train, and do without it
        why = self.losses.count(lost, self.policy) if is_missed else None
        if was_in_world:
            if self.roll.have_ended(self.members.world):
                return self._conclude(now)
            self._break(now)
        if why and self._ends_as is not Status.FAILED:
            return self._fail(why, now)
        return [*self._consider(now), *self._replenish(now)]

    def _refuse(self, failed: UserFailed, now: float) -> list[Instruction]:
        """The job raised. The run ends once its state is saved; who holds none may be in a bad place only."""
        members, who, why = self.members, failed.member, failed.message
        is_first = not (self._settled or members.found or members.missing)
        if is_first or (who in members.heirs and self.diagnosis.step == 0):
            return self._end(Status.FAILED, why)
        if not members.may_hold(who):
            told = self._fail(why, now) if self.losses.refuse() else []
            is_over = self.phase is Phase.ENDED
            return told if is_over else [*told, *self._evict(who, Cause.START_FAILED, why, now)]
        self.diagnosis.excuse(who)  # it comes to a world that only saves, at once or not at all
        if self._ends_as is Status.FAILED and not self._is_broken and self._ordered.only_saves:
            return self._evict(who, Cause.FAILED, why, now) if who in self.roll.came else []
        self._break(now)
        return self._fail(why, now)

    def _fail(self, why: str, now: float) -> list[Instruction]:
        """The run has to end; who holds its state saves that first, unless it is safe already."""
        if self.members.is_safe or not (self.members.is_held or self.roll.has_begun):
            return self._end(Status.FAILED, why)
        self._ends_as, self.stopping = Status.FAILED, None
        return self._stop(why, now)

    def _break(self, now: float) -> None:
        if not self._is_broken:
            self._is_broken, self._idle_since, self.phase = True, now, Phase.GATHERING

    def _consider(self, now: float) -> list[Instruction]:
        """Form the next world if there is a reason to; `_is_broken`: the present one cannot go on."""
        if not self._is_broken:
            return self._improve(now)
        if self.members.missing:
            return []
        is_unsafe = not self.members.is_safe and is_left_to_store(self.members, self.policy, self.most_ranks)
        if self.stopping or (is_unsafe and self.members.holders):
            return self._form_last(now)
        return self._choose(Manner.AT_ONCE, now)

    def _improve(self, now: float) -> list[Instruction]:
        """Let the world that trains become another one at a boundary, or save before all are taken away."""
        is_ending = self.roll.stage is Stage.ENDING and not self._is_parting
        if self.phase is not Phase.TRAINING or self.roll.ended or self.stopping or is_ending:
            return []
        if is_left_to_store(self.members, self.policy, self.most_ranks):
            is_told, self._is_parting = self._is_parting, True
            why = "all workers that hold the state will be taken away"
            return [] if is_told else [StopWorld(self.generation, why)]
        return self._choose(Manner.AT_BOUNDARY, now) if has_reason(self.members, self.policy) else []

    def _choose(self, manner: Manner, now: float) -> list[Instruction]:
        num_starting, building = len(self.members.starting), self.diagnosis.building
        waiting = Waiting(num_starting, building, now - self._idle_since, has_begun=self.generation > 0)
        decision = decide(self.members, self.policy, self.most_ranks, self.copies, waiting)
        match decision.action:
            case Action.GIVE_UP if manner is Manner.AT_ONCE:
                return self._fail(decision.reason, now)
            case Action.FORM:
                return [self._form(decision, manner, now)]
        return []

    def _form_last(self, now: float) -> list[Instruction]:
        """All is to end, and there is no world: whoever holds state saves it, be they ever so few."""
        holders = self.members.savers(self.copies)
        if self.members.is_safe:
            return self._end(self._ends_as, f"{self.stopping}")
        if holders:
            then = "and stop" if self.stopping else "before they are taken away"
            why = f"the survivors save the state {then}"
            last = self._form_to_save(holders[: self.most_ranks], Manner.AT_ONCE, why, now)
            self._is_parting = True
            return [last]
        return self._end(self._ends_as, f"{self.stopping}; no worker is left to save a final checkpoint")

    def _form_to_save(self, members: tuple[str, ...], manner: Manner, reason: str, now: float) -> FormWorld:
        """Form a world that makes no step: one may have killed those before it."""
        formed = self._form(Decision(Action.FORM, reason, members), manner, now)
        self._ordered = replace(formed, only_saves=True)
        self.roll.is_closing = True
        return self._ordered

    def _form(self, decision: Decision, manner: Manner, now: float) -> FormWorld:
        members, leaving = decision.members, decision.leaving
        self.generation = self.formed = self.generation + 1
        self.members.rank(members)
        self.phase, self._is_broken, self._is_parting = Phase.FORMING, False, False
        if manner is Manner.AT_ONCE and self.members.has_state:
            self._starts.hurry(now)
        origin = "survivors" if leaving and self.members.origin == "self" else self.members.origin
        self.roll = self.roll.succeed(members, manner, origin, self.members.holders, now=now)
        hosts = tuple(self.members.hosts[member] for member in members)
        self._ordered = FormWorld(self.generation, members, hosts, manner, decision.reason, leaving=leaving)
        return self._ordered

    def _settle(self, now: float) -> list[Instruction]:
        """Begin to train, once all hold the state."""
        if self.phase is not Phase.FORMING or not self.roll.has_settled:
            return []
        self.phase, self._settled = Phase.TRAINING, self.formed
        if self.members.settle(self._ordered.leaving):
            self.losses.num_refusals = 0
        if self._ordered.leaving:  # it makes no step
            self._break(now)
            return self._consider(now)
        if self.stopping:
            return [] if self.roll.is_closing else [StopWorld(self.generation, self.stopping)]
        return [*([] if self._ordered.only_saves else self._release(now)), *self._consider(now)]

    def _part(self, member: str, notice: str, now: float) -> list[Instruction]:
        """A member will be taken away: let the others go on without it from the next step boundary on."""
        if not self.members.knows(member) or member in self.members.leaving:
            return []
        self.members.part(member, notice)
        may_go = not self.members.is_ranked(member) and (self.members.is_safe or not self._is_broken)
        return [*(self._release(now) if may_go else self._replenish(now)), *self._consider(now)]

    def _resize(self, workers: int, now: float) -> list[Instruction]:
        """Aim at another number of workers; who is too many leaves at the next step boundary."""
        self.policy = resized(self.policy, min(workers, self.most_ranks), self._least)
        self.losses.num_in_a_row = 0  # they were many or few for another size
        is_training = self.phase is Phase.TRAINING
        return [*(self._release(now) if is_training else self._replenish(now)), *self._consider(now)]

    def _release(self, now: float) -> list[Instruction]:
        """End whom no world needs; beside one that only saves, everybody may be needed."""
        is_saving = self.roll.is_closing and not self._is_broken
        for one in (done := {} if is_saving else find_unneeded(self.members, self.policy)):
            self.members.drop(one)
        return [*(ReleaseMember(one, why) for one, why in done.items()), *self._replenish(now)]

    def _conclude(self, now: float) -> list[Instruction]:
        """The world has ended in good order, and what it held is durable."""
        if Ending.FINISHED in self.roll.ended.values():
            return self._end(Status.FINISHED, "all steps are committed and durable")
        if self.stopping:
            return self._end(self._ends_as, self.stopping)
        if not (self._is_parting or self._ordered.only_saves):
            return self._stall("the world stopped because one of its workers had no driver", now)
        self.members.disband()
        self._break(now)
        return [*self._release(now), *self._consider(now)]

    def _stop(self, reason: str, now: float) -> list[Instruction]:
        if self.stopping:
            return []
        self.stopping = reason
        self.members.hasten(now + self.policy.roll_s)
        if self._is_broken:
            return self._consider(now)
        return [] if self.roll.is_closing else [StopWorld(self.generation, reason)]  # it saves anyway

    def _wait(self, tick: Tick, now: float) -> list[Instruction]:
        """Look at who answers and at what moves; end who holds the others up."""
        self.diagnosis.look(tick, self.members.hosts, now=now, slept_s=self._clock.slept_s)
        overdue = [*self._give_up_overdue(now), *self._replenish(now)]
        if unreachable := self.diagnosis.unreachable():
            return [*overdue, *self._evict_all(unreachable, now)]
        if self._is_broken:
            return [*overdue, *self._consider(now)]
        match self.diagnosis.judge(self.roll, now):
            case Blamed() as blamed:
                return [*overdue, *self._evict_all(blamed, now)]
            case Stalled(why):
                return [*overdue, *self._stall(why, now)]
        return overdue

    def _evict_all(self, blamed: Blamed, now: float) -> Iterable[Instruction]:
        for member, what in blamed.evidence.items():
            if self.phase is Phase.ENDED:
                return
            if blamed.cause is Cause.CUT_OFF and self.members.is_last_holder(member):
                yield self._set_aside(member, what, now)
            else:
                yield from self._evict(member, blamed.cause, what, now)

    def _set_aside(self, member: str, why: str, now: float) -> Instruction:
        """Let the only one that holds the state save it alone, and go then: the others cannot reach it."""
        self._break(now)
        self.members.part(member, why)
        return self._form_to_save((member,), Manner.AT_ONCE, f"it saves the state alone: {why}", now)

    def _give_up_overdue(self, now: float) -> list[Instruction]:
        """Give up whom nobody has heard of; that is no failure, it never was there."""
        if self.members.missing:
            self._idle_since = now  # the time to gather begins once it is known who is there
        if self.members.is_missing_all and now - self._begun_at < self.policy.alone_s:
            return []  # perhaps it is this driver that is cut off
        why = "it did not answer in the time it has to start, or to greet a new driver"
        return [KillMember(one, why, Cause.START_FAILED) for one in self.members.drop_overdue(now)]

    def _stall(self, why: str, now: float) -> list[Instruction]:
        """The world cannot go on though nobody was lost: form it anew, for a while."""
        is_enough = self.diagnosis.stall(now)
        self._break(now)
        if not is_enough:
            return self._consider(now)
        reason = f"{self.diagnosis.num_stalls} worlds in a row got nowhere: {why}"
        return self._end(Status.FAILED, reason) if self.stopping else self._fail(reason, now)

    def _replenish(self, now: float) -> Iterable[Instruction]:
        """Start as many members as the policy's world lacks."""
        may_start = self._is_broken or self._starts.may_begin(now)
        if self.stopping or self.phase is Phase.ENDED or not may_start:
            return
        while self.members.num_lasting < self.policy.workers + self.policy.standbys:
            yield StartMember(self.members.name_next(now + self.policy.start_s))

    def _end(self, status: Status, reason: str) -> list[Instruction]:
        self.phase = Phase.ENDED
        return [End(status, reason)]
