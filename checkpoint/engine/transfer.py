"""How bytes get from tensors into the arena: copied by this thread on the CPU, by a side stream on CUDA.

A side stream waits, on the device, for what the training stream has queued when a snapshot is asked for, and
the training stream never waits for it. The arena is page-locked once, so that transfers are asynchronous.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

log = logging.getLogger("holdfast.checkpoint")

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of this process
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered: another saver of this process did it


class Transfer:
    """One capture thread's way into the arena."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._arena: Any = None
        self._has_locked = False

    def follow(self, devices: Iterable[torch.device]) -> None:
        """Let later copies see what the training thread, which calls this, has queued by now."""
        for device in {device for device in devices if device.type == "cuda"}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def prepare(self, space: memoryview) -> None:
        """Page-lock the arena that a region lies in, the first time that one of it is used."""
        if not self._streams or space.obj is self._arena:
            return
        self.release()
        self._arena = space.obj
        arena = np.frombuffer(memoryview(space.obj), np.uint8)
        with self._own_device() as device:
            code = int(_cudart().cudaHostRegister(arena.ctypes.data, arena.nbytes, _PORTABLE))
            self._has_locked = code == 0
            if code:
                with suppress(RuntimeError):
                    torch.zeros(
                        1, device=device
                    )  # the next kernel is blamed for the error: let it be this one
        if code not in (0, _ALREADY_REGISTERED):
            log.warning("CUDA error %d: the arena cannot be page-locked; copies will be slow", code)

    def release(self) -> None:
        """Give page-locked memory back, if it is this saver that locked it."""
        if self._has_locked:
            self.settle()  # copies of a capture that was given up may still be on their way
            with self._own_device():
                _cudart().cudaHostUnregister(np.frombuffer(memoryview(self._arena), np.uint8).ctypes.data)
        self._arena, self._has_locked = None, False

    @contextmanager
    def _own_device(self) -> Iterator[torch.device]:
        """Make a device of ours current in this thread, where it is the first of all by default."""
        device = next(iter(self._streams))
        with torch.cuda.device(device):
            yield device

    def beside(self, tensor: torch.Tensor) -> AbstractContextManager[Any]:
        """Return the context in which this thread may work with a tensor without waiting for training."""
        return torch.cuda.stream(self._streams[tensor.device]) if tensor.is_cuda else nullcontext()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy to the CPU; return the event that marks its end, None if it is over."""
        with self.beside(source):
            if source.is_cuda:  # who gives its memory back meanwhile, gives it back after the copy
                source.record_stream(torch.cuda.current_stream(source.device))
            target.copy_(source, non_blocking=True)
            return torch.cuda.current_stream(source.device).record_event() if source.is_cuda else None

    def settle(self) -> None:
        """Wait until all copies are over."""
        for stream in self._streams.values():
            stream.synchronize()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
