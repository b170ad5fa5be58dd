"""The driver: carries events to the controller and its instructions to the members.

The only loop with a clock.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any

from checkpoint import (
    EverySteps,
    LatestN,
    PruneReport,
    open_store,
    prune,
)
from elastic.control.controller import Controller
from elastic.control.events import (
    CheckpointDurable,
    Entry,
    Event,
    FaultStruck,
    GenerationTaken,
    MemberLost,
    SegmentEnded,
    SegmentStarted,
    StacksKept,
    StepCommitted,
    StopRequested,
    WorkersWanted,
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
from elastic.control.phase import Phase
from elastic.control.report import TrainReport
from elastic.errors import Fenced, TrainingFailed
from elastic.runtime.aside import Answer, asked_aside, begun_aside
from elastic.runtime.claims import Claims
from elastic.runtime.cluster import Cluster, check_portable
from elastic.runtime.journal import Journal, read_moments, read_report
from elastic.runtime.mailbox import WorldOrder
from elastic.runtime.metrics import Metrics
from elastic.runtime.notices import LogLine, Observer
from elastic.runtime.order import Fault, TrainOrder
from elastic.runtime.sole import sole_driver
from elastic.runtime.watch import Watch
from elastic.runtime.wish import Wish
from elastic.runtime.world import open_rendezvous

log = logging.getLogger("holdfast.driver")
HEAR_S = 0.1
REMIND_S = 1.0
STOP_LIMIT_S = 25.0
PRUNE_GRACE_S = 3600.0


def train(order: TrainOrder, observe: Observer) -> TrainReport:
    """Train a run to its end, whatever state it is in: new, left by a dead driver, or stopped before.

    SIGINT and SIGTERM end it cleanly, with a final checkpoint; the signal is raised again afterwards. Blocks
    until the end. Raises TrainingFailed when it could not finish, Fenced when another driver owns the run,
    JobRejected when the job's settings cannot travel to workers.
    """
    check_portable(order)
    with sole_driver(order), _polite_signals() as asked:
        report = _finished_report(order)
        if report is not None:
            return report
        with Journal(order.run_dir) as journal:
            end = Driver(order, journal, observe).run(asked)
    report = read_report(order.run_dir)
    if end.status is Status.FAILED:
        raise TrainingFailed(end.reason)
    if end.status is Status.STOPPED and not asked:
        raise TrainingFailed(f"the run stopped: {end.reason}; continue with: holdfast resume {order.run}")
    return report


class _TooLate(Exception):
    """The end that was asked for does not come in time."""


class Driver:
    """One driver's hold on a run."""

    def __init__(self, order: TrainOrder, journal: Journal, observe: Observer) -> None:
        self._order, self._journal = order, journal
        self._watch = Watch(order, observe)
        self._wish = Wish(order.run_dir, order.world.workers)
        self._store = open_store(order.checkpoint.store_url)
        self._claims = Claims(self._store, order.run)
        generation = self._claims.newest
        prefix = f"w{generation}." if generation else "w"
        copies = order.training.parameter_copies or order.training.optimizer_copies
        most_ranks, last_step = order.training.virtual_ranks, order.training.num_steps
        self._controller = Controller(
            order.world, prefix, generation, most_ranks=most_ranks, last_step=last_step, copies=copies
        )
        self._faults = sorted(order.drill, key=lambda fault: fault.at_step)[_num_struck(order) :]
        self._cleaning: Future[PruneReport] | None = None
        self._order_given: WorldOrder | None = None
        self._stop_given: StopWorld | None = None
        self._reminded_at = 0.0
        self._end: End | None = None
        self._asked: list[int] = []
        self._stop_at: float | None = None  # when an end that was asked for is too late
        self._is_late = False  # to end the workers: they are not done, and save by themselves
        self._metrics: Metrics | None = None  # once Ray is there
        self._note(SegmentStarted(order.training.num_steps, generation, time.time()))

    def run(self, asked: list[int]) -> End:
        """Drive until the controller says that the run is over.

        `asked` holds the signals that asked for its end. An error lets go of the workers without ending them:
        they hold the state, and whoever takes the run up within their lease finds them.
        """
        with self._recorded():
            self._watch.phase("starting the cluster")
            self._cluster = Cluster(self._order)
            self._metrics = Metrics(self._order.run)
            try:
                self._rendezvous, self._endpoint = open_rendezvous(self._cluster.address)
                end = self._loop(asked)
            except KeyboardInterrupt:
                self._cluster.end()
                raise
            except BaseException:
                self._cluster.detach()
                raise
            self._note(SegmentEnded(end.status, end.reason))
            self._watch.phase("ending the cluster")
            if self._is_late:
                self._cluster.detach()
            else:
                self._cluster.end()
                wait([self._cleaning] if self._cleaning else [], STOP_LIMIT_S)
        return end

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Note the error, if there is one, with which this driver leaves."""
        try:
            yield
        except BaseException as error:
            self._note(SegmentEnded(Status.FAILED, f"{type(error).__name__}: {error}"))
            raise

    def _loop(self, asked: list[int]) -> End:
        self._asked = asked
        try:
            if self._controller.generation:  # before anybody is found: who is, is ours
                self._ask_store(self._claims.take_over)
                self._controller.generation = self._claims.newest
            self._act(self._controller.begin(self._cluster.find(), time.monotonic()))
            while self._end is None:
                self._look()
            self._confirm()
        except _TooLate:
            self._is_late = True
            what = f"the final checkpoint takes longer than {STOP_LIMIT_S:.0f} s"
            why = f"{what}: the workers go on with it, and end with their lease"
            self._end = self._end or End(Status.STOPPED, why)
        return self._end

    def _look(self) -> None:
        """Hear what there is to hear, once."""
        for message in self._cluster.hear(HEAR_S):
            if isinstance(message, LogLine):
                self._watch.tell(message)
            elif isinstance(message, StacksKept):
                self._note(message)
            else:
                self._take(message)
        if self._asked and not self._controller.stopping:
            self._take(StopRequested(f"asked to by {signal.Signals(self._asked[0]).name}"))
        if (wanted := self._wish.news()) is not None:
            self._take(WorkersWanted(wanted))
        self._take(self._cluster.tick())
        self._remind(time.monotonic())
        if self._end is None:
            self._cluster.revive()
            self._live_on(self._controller.phase.value)

    def _live_on(self, phase: str) -> None:
        """Keep the run alive, whatever else there is to do. Raises _TooLate after a stop that takes long."""
        self._cluster.renew()
        self._watch.phase(phase)
        if self._asked and self._stop_at is None:
            self._stop_at = time.monotonic() + STOP_LIMIT_S
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            raise _TooLate

    def _take(self, event: Event) -> None:
        """Carry one event to the controller, and do what it says."""
        if self._end is not None:
            return
        now = time.monotonic()
        self._note(event)
        if getattr(event, "generation", 0) > self._controller.generation:
            raise Fenced(f"run {self._order.run} was taken over by another driver; this one stops")
        self._act(self._controller.handle(event, now))
        match event:
            case StepCommitted(step=step):
                self._strike(step)
            case CheckpointDurable():
                self._prune()
            case MemberLost(member) if self._cluster.may_live(member):
                self._confirm()
                self._cluster.kill(member)
            case _:
                pass

    def _act(self, instructions: list[Instruction]) -> None:
        if any(isinstance(each, KillMember | ReleaseMember) for each in instructions):
            self._confirm()
        for instruction in instructions:
            if isinstance(instruction, FormWorld):
                self._form(instruction)
                continue
            self._note(instruction)
            match instruction:
                case StartMember(member):
                    self._cluster.start(member)
                case KillMember(member):
                    self._cluster.end_silent(member)
                case ReleaseMember(member):
                    self._cluster.kill(member)
                case StopWorld():
                    self._stop_given = instruction
                    self._tell(self._controller.members.world, "stop", instruction)
                case End():
                    self._end = instruction

    def _form(self, form: FormWorld) -> None:
        """Claim a world's generation and tell its members; one that somebody has, who saved alone, is passed
        over.
        """
        if form.manner is Manner.AT_ONCE:
            self._tell(form.members, "leave", form.generation)  # they need not wait for the store
        if not self._ask_store(lambda: self._claims.claim(form.generation)):
            self._take(GenerationTaken(form.generation))
            return
        self._note(form)
        self._order_given = WorldOrder(form, self._endpoint, self._cluster.anchor)
        self._stop_given = None
        self._tell(form.members, "form", self._order_given)

    def _confirm(self) -> None:
        """Make sure that this driver still has the run, and ends nothing that a successor took over."""
        self._ask_store(self._claims.confirm)

    def _ask_store(self, question: Callable[[], Answer]) -> Answer:
        """Ask what the store has to answer. Nothing is decided before it does, as nothing could be done;
        members are polled, and what they tell waits. Whoever waits no longer leaves the run to others: the
        question comes to nothing then.
        """
        try:
            return asked_aside(question, lambda: self._live_on("waiting for the store"))
        except BaseException:
            self._claims.give_up()
            raise

    def _remind(self, now: float) -> None:
        """Tell again what has shown no effect yet: while a member cannot be reached, calls to it are lost."""
        if now - self._reminded_at < REMIND_S:
            return
        self._reminded_at = now
        for member in self._controller.members.missing:
            self._cluster.tell(member, "greet")
        if self._controller.phase is Phase.FORMING and self._order_given is not None:
            self._tell(tuple(self._controller.roll.late), "form", self._order_given)
        if self._controller.phase is Phase.TRAINING and self._stop_given is not None:
            self._tell(self._controller.members.world, "stop", self._stop_given)

    def _tell(self, members: tuple[str, ...], method: str, argument: object) -> None:
        for member in members:
            self._cluster.tell(member, method, argument)

    def _strike(self, step: int) -> None:
        """Carry out the drill's faults that are due."""
        while self._faults and self._faults[0].at_step <= step and self._controller.phase is Phase.TRAINING:
            fault: Fault = self._faults.pop(0)
            world = self._controller.members.world
            victim = world[min(fault.rank, len(world) - 1)]
            self._note(FaultStruck(victim, step))
            self._cluster.tell(victim, "die")

    def _prune(self) -> None:
        """Let retention catch up, aside from the loop; its failure is told, and never ends training."""
        if self._cleaning is not None:
            if not self._cleaning.done():
                return
            error = self._cleaning.exception()
            if error is not None:
                self._watch.happen("prune failed", f"old checkpoints could not be pruned: {error}")
        checkpoint = self._order.checkpoint
        policies: list[LatestN | EverySteps] = [LatestN(checkpoint.keep_latest)]
        if checkpoint.keep_every:
            policies.append(EverySteps(checkpoint.keep_every))
        self._cleaning = begun_aside(
            lambda: prune(self._store, policies, now_s=time.time(), grace_s=PRUNE_GRACE_S)
        )

    def _note(self, entry: Entry | Instruction) -> None:
        self._journal.record(time.monotonic(), entry)
        self._watch.see(entry)
        if self._metrics is not None:
            self._metrics.see(entry)


def _num_struck(order: TrainOrder) -> int:
    """Count the drill's faults that earlier drivers of this run have carried out; they are not due again."""
    return sum(isinstance(moment.entry, FaultStruck) for moment in read_moments(order.run_dir))


def _finished_report(order: TrainOrder) -> TrainReport | None:
    """Return the report of a run that has nothing left to do, so that a repeated call does nothing."""
    if not (order.run_dir / "journal.jsonl").exists():
        return None
    report = read_report(order.run_dir)
    is_done = report.status == Status.FINISHED and report.newest_durable_step == order.training.num_steps
    return report if is_done else None


@contextmanager
def _polite_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying of it; raise it again at the end.

    A second one acts at once.
    """
    asked: list[int] = []
    old: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for each, handler in old.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:
        log.debug("not in the main thread: signals are left alone")
    try:
        yield asked
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
    if asked:
        signal.raise_signal(asked[0])
        raise KeyboardInterrupt  # nobody took it: SIGINT is ignored in a shell's background jobs
