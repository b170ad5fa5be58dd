"""Capture: a rank's share is copied into the arena by a thread of its own, and proved not to be torn.

Three guards stand in each other's shadow: every optimizer's step waits for the capture (a hook); version
counters; and sampled lines of memory (`guards`). Small tensors need none: `save` copies them itself. Memory
that was given back (`untyped_storage().resize_(0)`) is not read: that is looked at right before each chunk,
of 4 MiB at most, is copied. Only who gives memory back in the very millisecond in which it is copied can
still end the process, on the CPU: nothing in torch keeps memory from its own storage's `resize_`. On CUDA the
allocator waits for the copy.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from checkpoint.engine.contract import Host, SnapshotPlan, Ticket
from checkpoint.engine.guards import Guards, Watch
from checkpoint.engine.leaving import finish_at_exit
from checkpoint.engine.staging import Staging
from checkpoint.engine.structure import Structure
from checkpoint.engine.transfer import Transfer
from checkpoint.errors import CheckpointError, KeeperLost, Torn

log = logging.getLogger("holdfast.checkpoint")

MAX_ATTEMPTS = 2  # a keeper that died is replaced once within a capture; then the snapshot is given up


@dataclass(frozen=True, slots=True)
class Take:
    """What `save` took of a share on the training thread: small tensors, and samples of the large ones."""

    structure: Structure
    small: Staging
    watches: tuple[Watch, ...]
    devices: tuple[torch.device, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A share of the state to capture. `captured` ends when it is in the arena, or never will be."""

    ticket: Ticket
    plan: SnapshotPlan
    take: Take
    captured: "Future[None]"


def take(
    structure: Structure, small: Staging, guards: Guards, own: Sequence[torch.Tensor], salt: int
) -> Take:
    """Copy the small tensors of a share, and look at the large ones. `own` are all leaves' own tensors."""
    small.take(own)
    return Take(structure, small, guards.watch(own, salt), tuple({tensor.device for tensor in own}))


def capture(snapshot: Snapshot, host: Host, transfer: Transfer, lent: Callable[[], None]) -> bool:
    """Copy a share into the arena, chunk by chunk, and seal it; False if the host does not take it.

    Calls `lent` once there is room for it. Spoils the share and raises Torn if it is torn.
    """
    ticket = snapshot.ticket
    space = host.open(ticket, snapshot.plan)
    lent()
    if space is None:
        return False
    try:
        copies = _copied(snapshot, space, host, transfer)
        for one, copy in zip(snapshot.take.watches, copies, strict=True):
            with transfer.beside(one.live):
                why = one.contradiction(copy)
            if why:
                raise _torn(snapshot, one, why)
    except Torn as error:
        host.spoil(ticket, str(error))
        raise
    host.seal(ticket)
    return True


def _copied(snapshot: Snapshot, space: memoryview, host: Host, transfer: Transfer) -> list[torch.Tensor]:
    """Copy and announce all chunks; return each watch's copy. No copy is under way any longer."""
    try:
        return _copy(snapshot, space, host, transfer)
    finally:
        transfer.settle()  # whatever happened: the region is another's once the share is spoiled


def _copy(snapshot: Snapshot, space: memoryview, host: Host, transfer: Transfer) -> list[torch.Tensor]:
    """Copy all chunks, announcing each; return where each watch's are. Copies may still be under way."""
    ticket, taken = snapshot.ticket, snapshot.take
    transfer.prepare(space)
    taken.small.put(space, transfer)
    copies, under_way = [], []
    for one in taken.watches:
        copies.append(one.captured(space))
        for number, part in one.chunks():
            if absence := one.absence():
                raise _torn(snapshot, one, absence)
            event = transfer.copy(copies[-1][part], one.live[part])
            if event is None:
                host.ready(ticket, number)
            else:
                under_way.append((number, event))
    for number, event in under_way:
        event.synchronize()
        host.ready(ticket, number)
    return copies


def _torn(snapshot: Snapshot, one: Watch, why: str) -> Torn:
    """Return the word that a chunk is not what was to be saved."""
    structure, ticket = snapshot.take.structure, snapshot.ticket
    name = structure.specs[one.slots[0].tensor].name
    message = f"tensor {name!r} changed while step {ticket.step} was captured ({why})"
    return Torn(f"{message}: call wait_captured() before anything changes the state")


@dataclass(frozen=True, slots=True)
class Ending:
    """A snapshot that was not captured. `why` is None if the host knows, and tells it as an outcome."""

    ticket: Ticket
    why: str | None


class Capturer:
    """The capture thread: one snapshot at a time. Optimizers of this process wait for it before they step."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transfer = Transfer()
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._asked_at: float | None = None
        self._endings: list[Ending] = []
        self._is_closed = False
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        self._thread = threading.Thread(target=self._work, name="holdfast-capture", daemon=True)
        self._thread.start()
        finish_at_exit(self.finish)

    def start(self, snapshot: Snapshot) -> None:
        """Hand a snapshot to the thread. The one before has been waited for."""
        self._transfer.follow(snapshot.take.devices)
        with self._changed:
            self._snapshot, self._asked_at = snapshot, time.monotonic()
            self._changed.notify_all()

    @property
    def asking_s(self) -> float:
        """How long room for the snapshot in hand is asked for already; 0 if it has some, or there is none."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def wait(self) -> None:
        """Wait until nothing is being captured; bounded by the plan's `max_wait_s` and the copy itself."""
        with self._changed:
            while self._snapshot is not None:
                self._changed.wait()

    def finish(self, timeout_s: float) -> bool:
        """Wait until nothing is being captured, for so long at most; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._snapshot is None, timeout_s)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being captured."""
        return self._snapshot is None

    def endings(self) -> list[Ending]:
        """Return (once) the snapshots that will not become checkpoints, as far as this side knows."""
        with self._changed:
            endings, self._endings = self._endings, []
        return endings

    def close(self) -> None:
        """End the thread, after the snapshot in hand."""
        self._hook.remove()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._transfer.release()

    def _before_step(self, *_: Any) -> None:
        with self._changed:
            while self._snapshot is not None:
                self._changed.wait()

    def _work(self) -> None:
        while self._capture_next():
            pass

    def _capture_next(self) -> bool:
        """Capture the next snapshot; False if there will be none. Keeps no tensor when it returns."""
        with self._changed:
            while self._snapshot is None and not self._is_closed:
                self._changed.wait()
            snapshot = self._snapshot
        if snapshot is None:
            return False
        error = self._capture(snapshot)
        with self._changed:
            self._snapshot = self._asked_at = None
            self._changed.notify_all()
        if error is None:
            snapshot.captured.set_result(None)
        else:
            snapshot.captured.set_exception(error.with_traceback(None))  # its frames hold tensors
        return True

    def _capture(self, snapshot: Snapshot) -> Exception | None:
        """Capture; return why that failed, if it did. Nothing that fails here may end the training."""
        try:
            if _capture_or_retry(snapshot, self._host, self._transfer, self._note_room):
                return None
            self._end(snapshot, None)
            return CheckpointError(f"step {snapshot.ticket.step} was not taken: its outcome says why")
        except Torn as error:
            log.error("%s", error)
            return error
        except KeeperLost as error:
            self._end(snapshot, str(error))
            return error
        except Exception as error:
            # The thread's border.
            log.exception("capture of step %d failed", snapshot.ticket.step)
            self._end(snapshot, f"{type(error).__name__}: {error}")
            _spoil(snapshot, self._host, f"capture failed: {error}")
            return error

    def _note_room(self) -> None:
        self._asked_at = None

    def _end(self, snapshot: Snapshot, why: str | None) -> None:
        with self._changed:
            self._endings.append(Ending(snapshot.ticket, why))


def _capture_or_retry(snapshot: Snapshot, host: Host, transfer: Transfer, lent: Callable[[], None]) -> bool:
    """Capture; if the keeper dies meanwhile, capture anew with its successor: the state is still there."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return capture(snapshot, host, transfer, lent)
        except KeeperLost as error:
            if attempt == MAX_ATTEMPTS:
                raise
            log.warning("capturing step %d anew: %s", snapshot.ticket.step, error)
    return False


def _spoil(snapshot: Snapshot, host: Host, why: str) -> None:
    try:
        host.spoil(snapshot.ticket, why)
    except KeeperLost as error:
        log.warning("%s", error)
