"""What a member and its driver tell each other: orders on the one side, news on the other."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from elastic.control.events import Event
from elastic.control.instructions import FormWorld
from elastic.runtime.lifeline import Anchor
from elastic.runtime.notices import LogLine
from elastic.runtime.world import Endpoint
from elastic.training.ports import Broken, Flags

MAX_UNREAD = 10_000


@dataclass(frozen=True, slots=True)
class WorldOrder:
    """An order to form a world, and where the driver that gave it has its rendezvous and its lifelines."""

    form: FormWorld
    endpoint: Endpoint
    anchor: Anchor


class Mailbox:
    """What the driver told a member that it has not acted on: the newest world order, and whether to stop."""

    def __init__(self, lease_s: float) -> None:
        self._changed = threading.Condition()
        self._order: WorldOrder | None = None
        self._taken = 0
        self._called_off = 0
        self._stop_generation = 0
        self._lease_s = lease_s
        self._heard_at = time.monotonic()

    def put(self, order: WorldOrder) -> bool:
        """Accept an order that is newer than any before; return whether it is."""
        with self._changed:
            if order.form.generation <= self.newest:
                return False
            self._order = order
            self._changed.notify_all()
            return True

    def call_off(self, generation: int) -> bool:
        """Take that all worlds before this generation are over; return whether that is new."""
        with self._changed:
            is_new = generation > self._called_off
            self._called_off = max(self._called_off, generation)
            return is_new

    def stop(self, generation: int) -> None:
        """Ask for a clean end of this generation's world."""
        with self._changed:
            self._stop_generation = max(self._stop_generation, generation)

    def hear(self) -> None:
        """Note that a driver is alive."""
        self._heard_at = time.monotonic()

    @property
    def is_orphaned(self) -> bool:
        """Whether no driver was heard of for the lease."""
        return time.monotonic() - self._heard_at > self._lease_s

    def next(self) -> WorldOrder | None:
        """Wait for the next world order; None when the lease runs out first."""
        with self._changed:
            while self._order is None:
                if self.is_orphaned:
                    return None
                self._changed.wait(timeout=1.0)
            order, self._order = self._order, None
            self._taken = order.form.generation
            return order

    @property
    def newest(self) -> int:
        """The newest world ordered (0: none)."""
        with self._changed:
            return self._order.form.generation if self._order else self._taken

    def has_newer(self) -> bool:
        """Whether a newer world was ordered than the one taken last."""
        return self._order is not None

    def check(self, generation: int) -> None:
        """Raise Broken if this generation's world was called off."""
        if generation < self._called_off:
            raise Broken(generation, f"it was called off: world {self._called_off} forms at once")

    def pending(self) -> Flags:
        """Tell the trainer what to propose at the next step boundary."""
        with self._changed:
            newer = self._order.form.generation if self._order else 0
            wants_stop = self._stop_generation >= self._taken or self.is_orphaned
            return Flags(next_generation=newer, stop=int(wants_stop))


class Outbox(logging.Handler):
    """What a member has to tell the driver, in order: events, and its log records.

    Bounded; the oldest go first.
    """

    def __init__(self, member: str) -> None:
        super().__init__(logging.INFO)
        self._member = member
        self._unread: deque[Event | LogLine] = deque(maxlen=MAX_UNREAD)
        self._changed = threading.Condition()

    def put(self, message: Event | LogLine) -> None:
        """Queue a message."""
        with self._changed:
            self._unread.append(message)
            self._changed.notify_all()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a log record."""
        self.put(LogLine(self._member, record.levelno, self.format(record)))

    def take(self, timeout_s: float) -> list[Event | LogLine]:
        """Return what is unread, waiting a while for something."""
        with self._changed:
            if not self._unread:
                self._changed.wait(timeout=timeout_s)
            taken = list(self._unread)
            self._unread.clear()
            return taken
