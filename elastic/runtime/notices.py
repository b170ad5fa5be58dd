"""What a driver tells whoever watches a run: progress, log lines, happenings. Values only."""

from collections.abc import Callable
from dataclasses import dataclass

from elastic.control.events import Event


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the run stands.

    `step` counts committed steps, `durable_step` is the newest durable checkpoint's (-1: none).
    """

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float
    world_size: int
    generation: int
    durable_step: int
    phase: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A record from a worker's log; `level` is logging's number."""

    member: str
    level: int
    message: str


@dataclass(frozen=True, slots=True)
class Happening:
    """Something a person wants to know at once: a loss, a new world, a joiner, a checkpoint that failed."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A member's answer to its driver: its news, how long it has been at its present micro-batch, and whether
    it can do nothing before there is room in its host's arena.
    """

    news: tuple[Event | LogLine, ...]
    working_s: float = 0.0
    is_waiting: bool = False


Notice = Progress | LogLine | Happening
Observer = Callable[[Notice], None]
