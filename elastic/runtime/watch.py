"""Turns what a driver sees into what a person wants to see."""

import logging
import time
from typing import Any

from elastic.control.events import (
    CheckpointDurable,
    CheckpointLost,
    Entry,
    FaultStruck,
    GenerationTaken,
    LossJumped,
    MemberLeaving,
    MemberLost,
    MemberReady,
    ReplicaHealed,
    Settled,
    StacksKept,
    StepCommitted,
    StepSkipped,
    UserFailed,
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
    StopWorld,
)
from elastic.runtime.notices import Happening, LogLine, Notice, Observer, Progress
from elastic.runtime.order import TrainOrder

log = logging.getLogger("holdfast.driver")
PROGRESS_EVERY_S = 0.25


class Watch:
    """Keeps a run's picture and tells its observer: happenings at once, progress a few times a second.

    An observer that raises is told nothing more; training goes on without it.
    """

    def __init__(self, order: TrainOrder, observe: Observer) -> None:
        self._observe: Observer | None = observe
        self._now = Progress(0, order.training.num_steps, float("nan"), 0.0, 0, 0, -1, "starting")
        self._told_at = 0.0
        self._position = (0, -1)  # (generation, step); a world that is only ordered does not move it
        self._settled: set[tuple[int, str, str]] = set()

    def tell(self, line: LogLine) -> None:
        """Pass a worker's log line on."""
        self._notify(line)

    def happen(self, kind: str, message: str) -> None:
        """Tell a happening that is no event."""
        self._notify(Happening(kind, message))

    def phase(self, phase: str) -> None:
        """Note what the run is doing."""
        if phase != self._now.phase:
            self._told_at = 0.0
            self._update(phase=phase)

    def see(self, entry: Entry | Instruction) -> None:
        """Take in one event or instruction."""
        match entry:
            case StepCommitted(generation=generation, step=step, loss=loss, seconds=seconds, tokens=tokens):
                if self._moves_to(generation, step):
                    rate = tokens / seconds if seconds else 0.0
                    self._update(step=step, loss=loss, tokens_per_s=rate)
            case Settled(generation=generation, step=step):
                if self._moves_to(generation, step):
                    self._update(step=step)
                self._tell_message(entry)
            case CheckpointDurable(step=step, tier=tier, num_bytes=num_bytes) if (
                step > self._now.durable_step
            ):
                self._update(durable_step=step)
                self.happen("checkpoint", f"step {step} is durable on {tier} ({num_bytes / 2**20:.1f} MiB)")
            case FormWorld(members=members, generation=generation):
                self._update(world_size=len(members), generation=generation)
                self._tell_message(entry)
            case _:
                self._tell_message(entry)

    def _moves_to(self, generation: int, step: int) -> bool:
        """Take over a position unless it is old; a newer world's counts, though it may be a step back."""
        is_new = (generation, step) > self._position
        self._position = max(self._position, (generation, step))
        return is_new

    def _tell_message(self, entry: Entry | Instruction) -> None:
        kind, message = _message(entry)
        if isinstance(entry, Settled):
            key = (entry.generation, entry.source, entry.note)
            is_usual = entry.source == "self" and not entry.note
            message = "" if key in self._settled or is_usual else message
            self._settled.add(key)
        if message:
            self.happen(kind, message)

    def _update(self, **changes: Any) -> None:
        values = {name: getattr(self._now, name) for name in Progress.__slots__} | changes
        self._now = Progress(**values)
        if time.monotonic() - self._told_at > PROGRESS_EVERY_S:
            self._told_at = time.monotonic()
            self._notify(self._now)

    def _notify(self, notice: Notice) -> None:
        if self._observe is None:
            return
        try:
            self._observe(notice)
        except Exception as error:  # noqa: BLE001  (the border to whoever looks on: a broken pipe, a server)
            self._observe = None
            log.warning(
                "an observer failed, and is told nothing more of the run: %s: %s", type(error).__name__, error
            )


def _message(entry: Entry | Instruction) -> tuple[str, str]:
    match entry:
        case StartMember() | KillMember() | ReleaseMember() | FormWorld() | StopWorld() | End():
            return _decided(entry)
        case _:
            return _happened(entry)


def _happened(entry: Entry) -> tuple[str, str]:
    match entry:
        case MemberReady(member, host, pid):
            return "member", f"{member} is ready (pid {pid} on {host})"
        case MemberLost(member, cause, evidence):
            return "lost", f"{member} is lost: {cause}. {evidence}"
        case MemberLeaving(member, notice):
            return "leaving", f"{member} will be taken away: {notice}"
        case GenerationTaken(generation):
            return "passed over", f"generation {generation}: a worker without a driver saved alone in it"
        case WorkersWanted(workers):
            return "resize", f"{workers} workers are wanted"
        case StacksKept(member, file):
            return "stacks", f"what {member} was doing is in {file}"
        case FaultStruck(member, step):
            return "drill", f"SIGKILL to {member} on purpose, at step {step}"
        case Settled(member, generation, step, source, seconds, note):
            extra = f". {note}" if note else ""
            return (
                "state",
                f"{member} is at step {step} of world {generation}, from {source} ({seconds:.2f} s){extra}",
            )
        case CheckpointLost(_, _, step, why):
            return "checkpoint lost", f"the snapshot of step {step} did not become a checkpoint: {why}"
        case StepSkipped() | LossJumped() | ReplicaHealed():
            return _went_wrong(entry)
        case UserFailed(member, _, step, _, traceback):
            return "failure", f"the job's code failed in {member} at step {step}\n{traceback}"
        case _:
            return "", ""


def _went_wrong(entry: StepSkipped | LossJumped | ReplicaHealed) -> tuple[str, str]:
    match entry:
        case StepSkipped(_, _, step, why):
            return "skipped", f"nothing of step {step} was applied: {why}"
        case LossJumped(_, _, step, loss, usual):
            return "loss", f"the loss jumped to {loss:.4g} at step {step}; {usual:.4g} was usual"
        case ReplicaHealed(member, _, step, tensors):
            named = ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "")
            return (
                "corruption",
                f"{member} was corrupt at step {step}, and healed: {named}",
            )


def _decided(instruction: Instruction) -> tuple[str, str]:
    match instruction:
        case StartMember():
            return "", ""
        case FormWorld(generation, members, _, manner, reason):
            when = "" if manner is Manner.AT_ONCE else f" {manner.value}"
            return "world", f"world {generation}: {', '.join(members)}{when} ({reason})"
        case KillMember(member, reason):
            return "kill", f"{member} is killed: {reason}"
        case ReleaseMember(member, reason):
            return "released", f"{member} is not needed any more: {reason}"
        case StopWorld(_, reason):
            return "stop", f"stopping at the next step boundary: {reason}"
        case End(status, reason):
            return "end", f"{status}: {reason}"
