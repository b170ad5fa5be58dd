"""The controller: events in, instructions out. It knows no process, no clock and no network.

A world goes GATHERING -> FORMING -> TRAINING; any loss leads back to FORMING with the survivors, a joiner
does so at a step boundary, and a request to stop leads to ENDED through one last checkpoint. What belongs to
an older generation is ignored.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from elastic.control.events import (
    Cause,
    Ending,
    Event,
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
from elastic.control.membership import Membership
from elastic.control.policy import Action, WorldPolicy, choose_world
from elastic.control.suspicion import Suspicion

SUSPICION_S = 1.0
FOUND_LIMIT_S = 10.0
HASTE_S = 2.0  # a process that starts takes seconds of a core: survivors come first, for so long at most
# Longer than a capture or a last drain may take (600 s each); who does not even answer is judged sooner.
STALL_LIMIT_S = 900.0
STALL_STEPS = 20
MAX_STALLS_IN_A_ROW = 3
HEALINGS_TO_EVICT = 2


class Phase(Enum):
    """What the run is doing."""

    GATHERING = "gathering workers"
    FORMING = "forming a world"
    TRAINING = "training"
    ENDED = "ended"


@dataclass(slots=True)
class Controller:
    """Decides which world forms next, from what happened.

    `generation` is the newest one claimed so far (0: none), `formed` the newest that this controller formed:
    what members still have to tell of an earlier driver's world is not about ours. `prefix` names this
    controller's members. No world has more than `most_ranks`.
    """

    policy: WorldPolicy
    prefix: str
    generation: int = 0
    formed: int = 0
    most_ranks: int = 1 << 30
    phase: Phase = Phase.GATHERING
    members: Membership = field(init=False)
    stopping: str | None = None
    num_failures: int = 0
    _losses_in_a_row: int = 0
    _stalls_in_a_row: int = 0
    _why_broken: str = ""
    _found: frozenset[str] = frozenset()
    _settled: set[str] = field(default_factory=set)
    _ended: dict[str, Ending] = field(default_factory=dict)
    _is_broken: bool = True
    _broken_at: float | None = None
    _hurries_since: float | None = None  # survivors are on their way to their next step
    _idle_since: float = 0.0
    _progress_at: float = 0.0
    _step_s: float = 0.0
    _num_healed: dict[str, int] = field(default_factory=dict)
    _suspicion: Suspicion = field(init=False)
    _diligence: Suspicion = field(init=False)

    def __post_init__(self) -> None:
        self._suspicion = Suspicion(self.policy.hang_floor_s)
        self._diligence = Suspicion(self.policy.hang_floor_s)
        self.members = Membership(self.prefix)

    def begin(self, found: Iterable[str], now: float) -> list[Instruction]:
        """Start the run: `found` members are alive already (an earlier driver's); start what is missing."""
        self._idle_since = self._progress_at = now
        self._found = frozenset(found)
        self.members.expect(sorted(self._found))
        return list(self._replenish())

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; return what to do about it, in order."""
        if self.phase is Phase.ENDED:
            return []
        match event:
            case MemberReady(member, host):
                self.members.admit(member, host)
                return self._consider(now)
            case MemberLost():
                return self._lose(event, now)
            case MemberFailed(member, evidence):
                return self._evict(member, Cause.FAILED, evidence, now)
            case ReplicaHealed(member):
                return self._distrust(member, now)
            case UserFailed():
                return self._end(Status.FAILED, event.message)
            case MemberLeaving(member, notice):
                return self._part(member, notice, now)
            case WorkersWanted(workers):
                return self._resize(workers, now)
            case StopRequested(reason):
                return self._stop(reason, now)
            case Tick():
                return [*self._relax(now - HASTE_S), *self._wait(event, now)]
            case WorldBroken() | Settled() | StepCommitted() | MemberEnded():
                return self._handle_of_world(event, now) if event.generation == self.formed else []
            case _:
                return []

    def _handle_of_world(
        self, event: WorldBroken | Settled | StepCommitted | MemberEnded, now: float
    ) -> list[Instruction]:
        """Take an event of the present world."""
        match event:
            case WorldBroken(evidence=evidence):
                self._broken_at = self._broken_at if self._broken_at is not None else now
                self._why_broken = evidence
            case Settled(member):
                return self._settle(member, now)
            case StepCommitted(seconds=seconds):
                self._progress_at = now
                self._losses_in_a_row = self._stalls_in_a_row = 0
                self._step_s = seconds if self._step_s == 0.0 else 0.8 * self._step_s + 0.2 * seconds
                return self._relax(now)
            case MemberEnded(member=member, ending=ending):
                return self._end_member(member, ending)
        return []

    def _distrust(self, member: str, now: float) -> list[Instruction]:
        """A member's state was corrupt: once may be a cosmic ray, twice is a broken machine."""
        self._num_healed[member] = self._num_healed.get(member, 0) + 1
        if self._num_healed[member] < HEALINGS_TO_EVICT or not self.members.knows(member):
            return []
        evidence = f"{member} held corrupt state {self._num_healed[member]} times"
        return self._evict(member, Cause.FAILED, evidence, now)

    def _evict(self, member: str, cause: Cause, evidence: str, now: float) -> list[Instruction]:
        """End a member, and go on as if it had died."""
        return [KillMember(member, evidence, cause), *self._lose(MemberLost(member, cause, evidence), now)]

    def _lose(self, lost: MemberLost, now: float) -> list[Instruction]:
        if not self.members.knows(lost.member):
            return []
        was_in_world = self.members.is_ranked(lost.member)
        was_expected = not was_in_world and lost.member in self.members.leaving
        self.members.drop(lost.member)
        if was_expected:
            return []
        self.num_failures += 1
        self._losses_in_a_row += 1
        if self.num_failures > self.policy.max_failures:
            return self._end(
                Status.FAILED,
                f"{self.num_failures} workers were lost, recovery.max_failures allows fewer: {lost.evidence}",
            )
        if self._losses_in_a_row > 2 * self.policy.workers + MAX_STALLS_IN_A_ROW:
            return self._end(
                Status.FAILED,
                f"{self._losses_in_a_row} workers were lost in a row without a step: {lost.evidence}",
            )
        if was_in_world:
            if self._all_ended():
                return self._conclude()
            self._break(now)
        return [*self._consider(now), *self._replenish()]

    def _break(self, now: float) -> None:
        if not self._is_broken:
            self._is_broken, self._idle_since = True, now
            self.phase = Phase.GATHERING

    def _consider(self, now: float) -> list[Instruction]:
        """Form the next world if there is a reason to; `_is_broken`: the present one cannot go on."""
        if not self._is_broken and (self.phase is not Phase.TRAINING or self._ended or self.stopping):
            return []
        if not self._is_broken and not self._has_reason():
            return []
        if self.stopping:
            holders = self.members.heirs or self.members.world
            return self._form_last(
                holders or tuple(one for one in self.members.outside if one in self._found), now
            )
        decision = choose_world(
            *self._candidates(),
            num_starting=len(self.members.starting),
            waited_s=now - self._idle_since,
        )
        if decision.action is Action.GIVE_UP:
            return self._end(Status.FAILED, decision.reason)
        if decision.action is Action.WAIT:
            return []
        manner = Manner.AT_ONCE if self._is_broken else Manner.AT_BOUNDARY
        return [self._form(decision.members, manner, decision.reason, now)]

    def _has_reason(self) -> bool:
        """Whether the world that trains should become another one at its next step boundary."""
        members, staying = self.members, self.members.staying
        if len(staying) < len(members.world):
            return len(staying) + len(members.outside) >= self.policy.min_workers
        return len(staying) > self.policy.workers or (
            len(staying) < self.policy.workers and bool(members.outside)
        )

    def _candidates(self) -> tuple[tuple[str, ...], Collection[str], WorldPolicy]:
        """Who may be in the next world. If all who hold the state are leaving, one of them hands it over."""
        members = self.members
        if members.has_heir:
            return members.staying, members.outside, self.policy
        heir = members.heirs[0]
        others = [one for one in (*members.staying, *members.outside) if one != heir]
        at_least_two = min(max(2, self.policy.workers), self.most_ranks)
        return (heir,), others, replace(self.policy, workers=at_least_two)

    def _form_last(self, survivors: tuple[str, ...], now: float) -> list[Instruction]:
        """A stop was asked for without a world: whoever holds state saves it, be they ever so few."""
        is_expecting = any(member in self._found for member in self.members.starting)
        if is_expecting and now - self._idle_since < FOUND_LIMIT_S:
            return []
        if not survivors:
            return self._end(Status.STOPPED, f"{self.stopping}; no worker is left to save a final checkpoint")
        return [self._form(survivors, Manner.AT_ONCE, "the survivors save the state and stop", now)]

    def _form(self, members: tuple[str, ...], manner: Manner, reason: str, now: float) -> Instruction:
        self.generation = self.formed = self.generation + 1
        self.members.rank(members)
        self.phase = Phase.FORMING
        self._is_broken, self._broken_at = False, None
        if manner is Manner.AT_ONCE and self.members.has_state and self._hurries_since is None:
            self._hurries_since = now
        self._settled, self._ended = set(), {}
        self._progress_at = now
        hosts = tuple(self.members.hosts[member] for member in members)
        return FormWorld(self.generation, members, hosts, manner, reason)

    def _settle(self, member: str, now: float) -> list[Instruction]:
        self._settled.add(member)
        self._progress_at = now
        if len(self._settled) < len(self.members.world) or not self._settled.issuperset(self.members.world):
            return []
        self.phase = Phase.TRAINING
        self.members.settle()
        if self.stopping:
            return [StopWorld(self.generation, self.stopping)]
        return [*self._release(), *self._consider(now)]

    def _part(self, member: str, notice: str, now: float) -> list[Instruction]:
        """A member will be taken away: let the others go on without it from the next step boundary on."""
        if not self.members.knows(member) or member in self.members.leaving:
            return []
        self.members.part(member, notice)
        released = [] if self._is_broken or self.members.is_ranked(member) else self._release()
        return [*(released or self._replenish()), *self._consider(now)]

    def _resize(self, workers: int, now: float) -> list[Instruction]:
        """Aim at another number of workers; who is too many leaves at the next step boundary."""
        most = min(workers, self.most_ranks)
        least = min(self.policy.min_workers, most)
        self.policy = replace(self.policy, workers=most, min_workers=least)
        self._losses_in_a_row = 0  # they were many or few for another size
        released = self._release() if self.phase is Phase.TRAINING else self._replenish()
        return [*released, *self._consider(now)]

    def _release(self) -> list[Instruction]:
        """End whom no world needs: who is leaving, who holds an old state, and who is one too many."""
        members, wanted = self.members, self.policy.workers + self.policy.standbys
        done = {one: why for one, why in members.leaving.items() if not members.is_ranked(one)}
        done |= dict.fromkeys(members.left_behind, "the world went on without it") | done
        for one in done:
            members.drop(one)
        surplus = members.num_lasting - max(wanted, len(members.staying))
        idle = [*members.starting, *members.outside] if surplus > 0 else []
        for one in idle[:surplus]:
            done[one] = f"{self.policy.workers} workers are wanted"
            members.drop(one)
        return [*(ReleaseMember(one, why) for one, why in done.items()), *self._replenish()]

    def _end_member(self, member: str, ending: Ending) -> list[Instruction]:
        if ending is Ending.REGROUP:
            return []
        self._ended[member] = ending
        return self._conclude() if self._all_ended() else []

    def _all_ended(self) -> bool:
        is_possible = 0 < len(self.members.world) <= len(self._ended)
        return is_possible and self._ended.keys() >= set(self.members.world)

    def _conclude(self) -> list[Instruction]:
        if Ending.FINISHED in self._ended.values():
            return self._end(Status.FINISHED, "all steps are committed and durable")
        return self._end(Status.STOPPED, self.stopping or "the workers' lease ran out")

    def _stop(self, reason: str, now: float) -> list[Instruction]:
        if self.stopping:
            return []
        self.stopping = reason
        if self._is_broken:
            return self._consider(now)
        return [StopWorld(self.generation, reason)]

    def _wait(self, tick: Tick, now: float) -> list[Instruction]:
        hosts = self.members.hosts  # who is still starting is not silent, and no measure for others
        self._suspicion.look({one: seconds for one, seconds in tick.silence_s.items() if one in hosts})
        self._diligence.look(tick.working_s)
        suspects = self._suspicion.silent()
        if self._broken_at is not None and now - self._broken_at > SUSPICION_S and not self._is_broken:
            return self._stall(self._why_broken, now)
        if self._is_broken:
            return self._consider(now)
        idle_s = now - self._progress_at
        is_training = self.phase is Phase.TRAINING and self._step_s > 0
        forming_s = self.policy.reforming_s if self.members.has_state else self.policy.forming_s
        patience_s = self.policy.hang_factor * self._step_s if is_training else forming_s
        silent = (
            [one for one in self.members.world if one in suspects and one not in self._ended]
            if suspects
            else []
        )
        if silent and idle_s > patience_s:
            return self._kill(silent, "has not answered", now)
        if is_training and idle_s > patience_s and (stuck := self._stuck(tick)):
            return self._kill(stuck, "is stuck in a micro-batch while others wait for it", now)
        if idle_s > max(STALL_LIMIT_S, STALL_STEPS * self._step_s):
            return self._stall(f"no step was committed for {idle_s:.0f} s, though all workers answer", now)
        return []

    def _stall(self, why: str, now: float) -> list[Instruction]:
        """The world cannot go on though nobody was lost: form it anew, a few times."""
        self._stalls_in_a_row += 1
        if self._stalls_in_a_row > MAX_STALLS_IN_A_ROW:
            return self._end(Status.FAILED, f"{self._stalls_in_a_row} worlds in a row got nowhere: {why}")
        self._break(now)
        return self._consider(now)

    def _stuck(self, tick: Tick) -> list[str]:
        """Name those whose micro-batch takes much longer than any did, if somebody is done and waits: what
        holds all of them up, slow data perhaps, is nobody's hang.
        """
        stuck = self._diligence.silent()
        if not stuck or all(tick.working_s.get(one, 0.0) > 0.0 for one in self.members.world):
            return []
        return [one for one in self.members.world if one in stuck]

    def _kill(self, hung: list[str], what: str, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for member in hung:
            evidence = f"{member} {what}, and no step was committed for {now - self._progress_at:.0f} s"
            instructions.extend(self._evict(member, Cause.HUNG, evidence, now))
        return instructions

    def _relax(self, by: float) -> list[Instruction]:
        """Start what is lacking if the survivors, who hurried since before, have had their time."""
        if self._hurries_since is None or self._hurries_since > by:
            return []
        self._hurries_since = None
        return list(self._replenish())

    def _replenish(self) -> Iterable[Instruction]:
        """Start as many members as the policy's world lacks."""
        is_hurrying = self._hurries_since is not None and not self._is_broken
        if self.stopping or self.phase is Phase.ENDED or is_hurrying:
            return
        while self.members.num_lasting < self.policy.workers + self.policy.standbys:
            yield StartMember(self.members.name_next())

    def _end(self, status: Status, reason: str) -> list[Instruction]:
        self.phase = Phase.ENDED
        return [End(status, reason)]
