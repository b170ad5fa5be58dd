"""Capture: this rank's boxes are copied into the arena by a thread of their own, and proved not to be torn.

An optimizer changes state in place, so what is captured late may be half of one step and half of the next.
Three guards stand in each other's shadow: every optimizer's step waits for the capture (a hook); version
counters; and, because fused optimizers, `.data` and numpy move no counter, blocks sampled when the snapshot
was asked for, which the captured copy and the live tensor both still have to equal when the capture ends.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from checkpoint.engine.contract import Host, Slot, SnapshotPlan, Ticket
from checkpoint.errors import ArenaFull, KeeperLost, Torn

log = logging.getLogger("holdfast.checkpoint")

SAMPLE_ELEMENTS = 64
SAMPLES_PER_CHUNK = 2
SMALL_CHUNK_BYTES = 4096  # one sample is enough for these; there may be thousands
MAX_ATTEMPTS = 2  # a keeper that died is replaced once within a capture; then the snapshot is given up
_STRIDE = (
    0x9E3779B97F4A7C15  # the golden ratio's: consecutive samples spread evenly, and differ from step to step
)

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    """A block of a chunk: its place in the tensor and in the chunk, and its elements at `save`."""

    live: Index
    captured: Index
    before: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Watch:
    """One chunk to capture, and what it looked like when the snapshot was asked for."""

    name: str
    live: torch.Tensor
    slot: Slot
    version: int
    samples: tuple[_Sample, ...]


class Snapshot:
    """A share of the state as it is now. Made on the training thread; copies no more than a few samples."""

    def __init__(self, ticket: Ticket, plan: SnapshotPlan, tensors: Sequence[torch.Tensor]) -> None:
        self.ticket = ticket
        self.plan = plan
        names = [spec.name for spec in plan.content.tensors]
        self._watches = [
            _watch(names[slot.tensor], tensors[slot.tensor].detach(), slot, ticket.step + index)
            for index, slot in enumerate(plan.slots)
        ]
        devices = {watch.live.device for watch in self._watches if watch.live.is_cuda}
        # The capture's stream starts where the training stream stands now: behind the step that made this.
        self._streams = {device: torch.cuda.Stream(device) for device in devices}  # type: ignore[no-untyped-call]  # torch's own
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def capture(self, host: Host) -> bool:
        """Copy the share into the arena, chunk by chunk, and seal it; False if the host does not take it.

        Spoils the share and raises Torn if it is torn.
        """
        space = host.open(self.ticket, self.plan)
        if space is None:
            return False
        captured = []
        for index, watch in enumerate(self._watches):
            captured.append(self._copy(watch, space))
            host.ready(self.ticket, index)
        for watch, copy in zip(self._watches, captured, strict=True):
            if why := _contradiction(watch, copy):
                message = f"tensor {watch.name!r} changed while step {self.ticket.step} was captured ({why})"
                host.spoil(self.ticket, message)
                raise Torn(f"{message}: call wait_captured() before anything changes the state")
        host.seal(self.ticket)
        return True

    def _copy(self, watch: _Watch, space: memoryview) -> torch.Tensor:
        slot = watch.slot
        raw = space[slot.offset : slot.offset + slot.num_bytes]
        copy = torch.frombuffer(raw, dtype=watch.live.dtype).view(slot.box.size)
        source = watch.live[_slices(slot)] if slot.box.size else watch.live
        if watch.live.is_cuda:
            stream = self._streams[watch.live.device]
            with torch.cuda.stream(stream):
                copy.copy_(source, non_blocking=True)
            stream.synchronize()
        else:
            copy.copy_(source)
        return copy


@dataclass(frozen=True, slots=True)
class Ending:
    """A snapshot that was not captured. `why` is None if the host knows, and tells it as an outcome."""

    ticket: Ticket
    why: str | None


class Capturer:
    """The capture thread: one snapshot at a time. Optimizers of this process wait for it before they step."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._endings: list[Ending] = []
        self._full: ArenaFull | None = None
        self._is_closed = False
        self._hook = register_optimizer_step_pre_hook(self._before_step)
        self._thread = threading.Thread(target=self._work, name="holdfast-capture", daemon=True)
        self._thread.start()

    def start(self, snapshot: Snapshot) -> None:
        """Hand a snapshot to the thread. The one before has been waited for."""
        with self._changed:
            self._snapshot = snapshot
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until nothing is being captured; bounded by the plan's `max_wait_s` and the copy itself.

        Raises `ArenaFull` once if the snapshot could never fit.
        """
        with self._changed:
            while self._snapshot is not None:
                self._changed.wait()
            full, self._full = self._full, None
        if full is not None:
            raise full

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being captured."""
        return self._snapshot is None and self._full is None

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

    def _before_step(self, *_: Any) -> None:
        with self._changed:
            while self._snapshot is not None:
                self._changed.wait()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._snapshot is None and not self._is_closed:
                    self._changed.wait()
                snapshot = self._snapshot
            if snapshot is None:
                return
            self._capture(snapshot)
            with self._changed:
                self._snapshot = None
                self._changed.notify_all()

    def _capture(self, snapshot: Snapshot) -> None:
        try:
            if not _capture_or_retry(snapshot, self._host):
                self._end(snapshot, None)
        except Torn as error:
            log.error("%s", error)
        except ArenaFull as error:
            self._full = error
            self._end(snapshot, None)
        except KeeperLost as error:
            self._end(snapshot, str(error))
        except Exception as error:
            # The thread's border: what fails here must not end the training.
            log.exception("capture of step %d failed", snapshot.ticket.step)
            self._end(snapshot, f"{type(error).__name__}: {error}")
            _spoil(snapshot, self._host, f"capture failed: {error}")

    def _end(self, snapshot: Snapshot, why: str | None) -> None:
        with self._changed:
            self._endings.append(Ending(snapshot.ticket, why))


def _capture_or_retry(snapshot: Snapshot, host: Host) -> bool:
    """Capture; if the keeper dies meanwhile, capture anew with its successor: the state is still there."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return snapshot.capture(host)
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


def _watch(name: str, live: torch.Tensor, slot: Slot, salt: int) -> _Watch:
    version = -1 if live.is_inference() else live._version
    num_samples = SAMPLES_PER_CHUNK if slot.num_bytes > SMALL_CHUNK_BYTES else 1
    samples = tuple(_sample(live, slot, salt * SAMPLES_PER_CHUNK + number) for number in range(num_samples))
    return _Watch(name, live, slot, version, samples)


def _sample(live: torch.Tensor, slot: Slot, salt: int) -> _Sample:
    """Clone up to 64 neighbouring elements of a chunk, at a place that the salt chooses."""
    within: list[int | slice] = []
    place = salt * _STRIDE & 0xFFFFFFFFFFFFFFFF
    for size in slot.box.size[:-1]:
        place, chosen = divmod(place, size)
        within.append(chosen)
    if slot.box.size:
        last = slot.box.size[-1]
        start = place % max(last - SAMPLE_ELEMENTS + 1, 1)
        within.append(slice(start, min(start + SAMPLE_ELEMENTS, last)))
    captured = tuple(within)
    index = tuple(_shifted(at, start) for at, start in zip(captured, slot.box.start, strict=True))
    return _Sample(index, captured, live[index].clone())


def _shifted(at: int | slice, start: int) -> int | slice:
    return slice(at.start + start, at.stop + start) if isinstance(at, slice) else at + start


def _contradiction(watch: _Watch, copy: torch.Tensor) -> str | None:
    """Say what proves that the captured copy is not the state that was to be saved."""
    if watch.version >= 0 and watch.live._version != watch.version:
        return f"its version counter moved from {watch.version} to {watch.live._version}"
    for sample in watch.samples:
        before = _bits(sample.before)
        if not torch.equal(before, _bits(copy[sample.captured])) or not torch.equal(
            before, _bits(watch.live[sample.live])
        ):
            return "sampled elements differ from those at the time of the save"
    return None


def _bits(block: torch.Tensor) -> torch.Tensor:
    """Return a block's bits, so that NaN equals itself and -0 does not equal 0."""
    return block.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def _slices(slot: Slot) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(slot.box.start, slot.box.stop, strict=True))
