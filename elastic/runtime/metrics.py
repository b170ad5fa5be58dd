"""A run's metrics, through Ray: every node's Prometheus endpoint shows them, as `ray_holdfast_...`."""

from ray.util.metrics import Counter, Gauge, Histogram

from elastic.control.events import (
    Cause,
    CheckpointDurable,
    CheckpointLost,
    Entry,
    MemberLost,
    ReplicaHealed,
    Settled,
    StepCommitted,
)
from elastic.control.instructions import FormWorld, Instruction, KillMember

_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class Metrics:
    """What the driver sees, as numbers. One driver has one; Ray has to be connected."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._committed = 0
        self._gone: set[str] = set()
        self._step = self._gauge("step", "Optimizer steps committed.")
        self._loss = self._gauge("loss", "Training loss of the newest committed step.")
        self._rate = self._gauge("tokens_per_s", "Tokens of the newest committed step per second.")
        self._world = self._gauge("world_size", "Ranks of the newest world.")
        self._generation = self._gauge("generation", "Number of the newest world.")
        self._durable = self._gauge("durable_step", "Newest step that is durable, by tier.", "tier")
        self._lost = self._counter("members_lost", "Members lost, by cause.", "cause")
        self._failed = self._counter("checkpoints_lost", "Checkpoints that did not become durable.")
        self._healed = self._counter("replicas_healed", "Replicas that were found corrupt, and healed.")
        self._step_s = self._histogram("step_seconds", "Seconds a committed step took.")
        self._blocked_s = self._histogram("blocked_seconds", "Seconds that capture held a step up.")
        self._restore_s = self._histogram("restore_seconds", "Seconds until a member held the world's state.")

    def see(self, entry: Entry | Instruction) -> None:
        """Take in one event or instruction."""
        match entry:
            case StepCommitted():
                self._see_step(entry)
            case FormWorld(members=members, generation=generation):
                self._world.set(len(members), self._run)
                self._generation.set(generation, self._run)
            case Settled(seconds=seconds):
                self._restore_s.observe(seconds, self._run)
            case CheckpointDurable(step=step, tier=tier):
                self._durable.set(step, {**self._run, "tier": tier})
            case CheckpointLost():
                self._failed.inc(1, self._run)
            case MemberLost(member, cause) | KillMember(member, cause=cause):
                self._see_loss(member, cause)
            case ReplicaHealed():
                self._healed.inc(1, self._run)
            case _:
                pass

    def _see_loss(self, member: str, cause: Cause) -> None:
        """Take in that a member died, or is ended as one that cannot stay: the first word counts."""
        if member not in self._gone:
            self._gone.add(member)
            self._lost.inc(1, {**self._run, "cause": cause.value})

    def _see_step(self, event: StepCommitted) -> None:
        """Take in a step, which every rank tells of: the first word counts."""
        if event.step <= self._committed:
            return
        self._committed = event.step
        self._step.set(event.step, self._run)
        self._loss.set(event.loss, self._run)
        if event.seconds:
            self._rate.set(event.tokens / event.seconds, self._run)
        self._step_s.observe(event.seconds, self._run)
        self._blocked_s.observe(event.blocked_s, self._run)

    def _gauge(self, name: str, meaning: str, *keys: str) -> Gauge:
        return Gauge(f"holdfast_{name}", meaning, ("run", *keys))

    def _counter(self, name: str, meaning: str, *keys: str) -> Counter:
        return Counter(f"holdfast_{name}", meaning, ("run", *keys))

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"holdfast_{name}", meaning, _SECONDS, ("run",))
