"""Who holds a world up. Pure.

A process that does not answer is told by its silence, one that is stuck in a micro-batch by its length. In
any other place a hang shows as nothing moving, and whoever waits for the one that hangs looks just like it.
So the roll is called: the world is to form anew at once, which frees all who wait, and who does not come
while others do is the one. If all come and cannot connect, they say whom they cannot reach.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from elastic.control.attendance import Attendance, OfWorld, Stage
from elastic.control.diligence import Diligence
from elastic.control.events import Cause, Settled, StepCommitted, Tick, WorldBroken
from elastic.control.instructions import Manner
from elastic.control.policy import WorldPolicy
from elastic.control.reach import Reach
from elastic.control.suspicion import PAUSES, Suspicion

SUSPICION_S = 1.0  # from a world's first crack until it forms anew, if nobody is told to be lost
STALL_STEPS = 20
MAX_STALLS_IN_A_ROW = 3
MAX_DOUBLINGS = 4  # of the patience, while a world gets nowhere again and again
_COMING = "coming"


@dataclass(frozen=True, slots=True)
class Blamed:
    """Members that hang, or that their peers cannot reach, each with the evidence."""

    evidence: Mapping[str, str]
    cause: Cause = Cause.HUNG


@dataclass(frozen=True, slots=True)
class Stalled:
    """The world gets nowhere, and nobody can be named yet."""

    why: str


Verdict = Blamed | Stalled | None


@dataclass(slots=True)
class Diagnosis:
    """Knows how long things take on this cluster, and judges by that."""

    policy: WorldPolicy
    num_stalls: int = 0
    building: frozenset[str] = frozenset()  # they are up, and not ready yet
    _stalls_since: float = 0.0
    _reach: Reach = field(default_factory=Reach)
    _silence: Suspicion = field(init=False)
    _diligence: Diligence = field(init=False)
    _slept_s: float = 0.0
    _ready: AbstractSet[str] = frozenset()
    _position: tuple[int, int] = (0, 0)  # the newest generation that told of its step, and that step
    _step_s: float = 0.0
    _longest_s: dict[str, float] = field(default_factory=dict)
    _seasoned: set[str] = field(default_factory=set)
    _unused: set[str] = field(default_factory=set)
    _raised: set[str] = field(default_factory=set)
    _waited_at: dict[str, float] = field(default_factory=dict)  # for room, when that was seen last

    def __post_init__(self) -> None:
        self._silence = Suspicion(self.policy.hang_floor_s)
        self._diligence = Diligence(self.policy.work_floor_s, self.policy.patience_s)

    def look(self, tick: Tick, ready: Collection[str], *, now: float, slept_s: float) -> None:
        """Take what members show; who is not `ready` is still starting, and no measure for others. Nor is who
        does not show anything: it has just died.
        """
        self._waited_at |= dict.fromkeys(tick.waiting, now)
        fresh_s, self._slept_s = slept_s - self._slept_s, slept_s
        silence_s = {one: s for one, s in tick.silence_s.items() if one in ready}
        self._ready = silence_s.keys()
        answering = (one for one, s in tick.silence_s.items() if s < self.policy.unreachable_s)
        self.building = frozenset(one for one in answering if one not in ready)
        self._silence.look(silence_s, fresh_s)
        self._diligence.look(tick.working_s, fresh_s)

    def welcome(self, member: str) -> None:
        """Note a member that is idle: it has nothing to leave before it comes."""
        self._unused.add(member)

    def excuse(self, member: str) -> None:
        """Note a member whose job raised: that it is at no micro-batch any more proves nothing of them."""
        self._raised.add(member)
        self.welcome(member)

    def learn(self, event: OfWorld) -> None:
        """Learn from what members tell, of whatever world."""
        self._unused.discard(event.member)
        match event:
            case WorldBroken():
                self._reach.take(event)
            case Settled(generation=generation, step=step):
                self._reach.settle(generation)
                self._position = max(self._position, (generation, step))
            case StepCommitted(member=member, generation=generation, step=step, seconds=seconds):
                self._reach.settle(generation)
                self._position = max(self._position, (generation, step))
                self._seasoned.add(member)
                self._step_s = seconds if self._step_s == 0.0 else 0.8 * self._step_s + 0.2 * seconds

    def learn_of_coming(self, member: str, ordered_at: float, now: float) -> None:
        """Learn how long it takes a member to leave what it is in, and to come."""
        if member in self._seasoned:
            self._lengthen(_COMING, now - self._since(ordered_at, (member,)))

    def learn_of_settling(self, roll: Attendance, seconds: float) -> None:
        """Learn how long it takes to come to one state, by where members get it from; and that they have
        reached each other.
        """
        self._lengthen(roll.origin, seconds)
        self._reach.acquit(roll.ranks)

    def expect_restore(self, member: str) -> None:
        """Note that a member may have to restore a state before it makes another step."""
        self._seasoned.discard(member)

    def forget(self, member: str) -> None:
        """Forget a lost member."""
        self._seasoned.discard(member)
        self._unused.discard(member)
        self._raised.discard(member)
        self._waited_at.pop(member, None)

    def stall(self, now: float) -> bool:
        """Count a world that got nowhere; return whether it is time to give up."""
        self._stalls_since = self._stalls_since if self.num_stalls else now
        self.num_stalls += 1
        return self.num_stalls > MAX_STALLS_IN_A_ROW and now - self._stalls_since > self.policy.wait_s

    def unreachable(self) -> Blamed | None:
        """Blame whose process has not answered for so long that it matters wherever it is."""
        is_cut_off = self._silence.is_deaf and len(self._ready) > 1
        limit_s = max(self.policy.alone_s if is_cut_off else self.policy.unreachable_s, self._silence.limit_s)
        return _hung(self._silence.longer_than(limit_s), f"has not answered for {limit_s:.0f} s")

    def judge(self, roll: Attendance, now: float) -> Verdict:
        """Say who holds this world up, or that somebody does."""
        if roll.broken_at is not None and now - roll.broken_at > SUSPICION_S * self._backoff:
            if not (cut_off := self._reach.name(roll.ranks, roll.holding)):
                return Stalled(roll.why_broken)
            self.num_stalls = 0  # the next world is another one
            return Blamed(cut_off, Cause.CUT_OFF)
        idle_s = now - roll.moved_at
        return (
            self._judge_silent(roll, idle_s)
            or self._judge_working(roll, idle_s)
            or self._judge_late(roll, now)
            or self._judge_all(roll, now - self._since(roll.moved_at, roll.members))
        )

    def _judge_silent(self, roll: Attendance, idle_s: float) -> Verdict:
        """Blame whose process does not answer; not all that hold the state at once, it would be lost."""
        is_stepping = roll.stage in (Stage.TRAINING, Stage.ENDING) or (
            roll.stage is Stage.COMING and roll.manner is Manner.AT_BOUNDARY
        )
        if is_stepping and self._step_s > 0:
            patience_s = self.policy.hang_factor * self._step_s
        else:
            patience_s = self.policy.forming_s if roll.origin == "store" else self.policy.reforming_s
        if idle_s <= patience_s:
            return None
        silent = [one for one in self._silence.silent() if one in roll.members and one not in roll.ended]
        if roll.holding.issubset(silent):
            return None
        return _hung(silent, f"has not answered, and nothing moved for {idle_s:.0f} s")

    def _judge_working(self, roll: Attendance, idle_s: float) -> Verdict:
        """Blame whose micro-batch takes much longer than any did, if somebody is done and waits: what holds
        all of them up, slow data perhaps, is nobody's hang. Nor all that hold the state at once.
        """
        if roll.stage in (Stage.CONNECTING, Stage.SETTLING) or self._step_s == 0.0:
            return None
        if idle_s <= self.policy.hang_factor * self._step_s or self._are_all_working(roll):
            return None
        stuck, limit_s, step = self._diligence.stuck(self.step) & roll.members, self.work_limit_s, self.step
        if not stuck or (roll.holding <= stuck and idle_s <= self.policy.patience_s):
            return None
        self._diligence.blame(step)
        what = f"is stuck in a micro-batch of step {step} for {limit_s:.0f} s while others wait for it"
        return _hung(stuck, f"{what}, and nothing moved for {idle_s:.0f} s")

    def _judge_late(self, roll: Attendance, now: float) -> Verdict:
        """Blame who does not come to a world that others came to; if nobody comes for very long, all."""
        if roll.manner is not Manner.AT_ONCE or roll.stage is not Stage.COMING:
            return None
        waited_s = now - roll.ordered_at
        late = [
            one for one in roll.late if now - self._since(roll.ordered_at, (one,)) > self._lateness_s(one)
        ]
        if self._seasoned.isdisjoint(roll.came):  # who was idle comes at once, and proves nothing
            late = [one for one in late if one in self._unused or waited_s > self.policy.patience_s]
        return _hung(late, f"has not come to the new world for {waited_s:.0f} s, though it answers")

    def _judge_all(self, roll: Attendance, idle_s: float) -> Verdict:
        """Say that it is time to call the roll."""
        if roll.stage is Stage.COMING and roll.manner is Manner.AT_ONCE:
            return None  # it is being called
        if idle_s <= self._stage_s(roll) * self._backoff:
            return None
        return Stalled(
            f"nothing moved for {idle_s:.0f} s, though all workers answer: waiting for {roll.stage.value}"
        )

    def _stage_s(self, roll: Attendance) -> float:
        """How long nothing may move at this stage."""
        match roll.stage:
            case Stage.CONNECTING:
                return self.policy.late_s
            case Stage.SETTLING if roll.origin == "store":
                return self.policy.patience_s  # what one place gave quickly another may give slowly
            case Stage.SETTLING:
                return self._usual_s(roll.origin, self.policy.roll_s)
            case Stage.ENDING:
                return self.policy.save_s + self.policy.late_s
            case _ if self._step_s == 0.0 or self._diligence.is_any_working(roll.stepping):
                return self.policy.patience_s  # who is at one for too long is found by that
            case _:
                return max(self.policy.roll_s, STALL_STEPS * self._step_s)

    def _lateness_s(self, member: str) -> float:
        """How long this member may take to come, as others have that were in the same world."""
        if member in self._unused:  # it has nothing to leave
            return self.policy.late_s
        if member not in self._seasoned:  # its first step may compile, its state may be restored
            return self.policy.patience_s
        # It comes between two micro-batches, which may be long ones.
        usual_s = max(self.policy.late_s, PAUSES * self._longest_s.get(_COMING, 0.0), self.work_limit_s)
        return min(usual_s, self.policy.patience_s)

    def _usual_s(self, what: str, floor_s: float) -> float:
        longest_s = self._longest_s.get(what)
        return self.policy.patience_s if longest_s is None else max(floor_s, PAUSES * longest_s)

    def _since(self, at: float, members: Collection[str]) -> float:
        """Return since when these can be held to account for what should have happened since `at`."""
        return max([at, *(waited_at for one, waited_at in self._waited_at.items() if one in members)])

    def _lengthen(self, what: str, seconds: float) -> None:
        self._longest_s[what] = max(self._longest_s.get(what, 0.0), seconds)

    def _are_all_working(self, roll: Attendance) -> bool:
        """Whether all who make the present step are at it; who has made none yet proves nothing: its first
        micro-batch is not told.
        """
        asked = (self._ready & self._seasoned & roll.stepping) - self._raised
        return self._diligence.are_all_working(asked)

    @property
    def step(self) -> int:
        """How many steps are committed, as far as was told: the number of the present one."""
        return self._position[1]

    @property
    def work_limit_s(self) -> float:
        """How long a micro-batch of the present step may take."""
        return self._diligence.limit_s(self.step)

    @property
    def _backoff(self) -> float:
        return 2.0 ** min(self.num_stalls, MAX_DOUBLINGS)


def _hung(members: Collection[str], what: str) -> Blamed | None:
    """Make the verdict, if anybody is guilty."""
    return Blamed({one: f"{one} {what}" for one in sorted(members)}) if members else None
