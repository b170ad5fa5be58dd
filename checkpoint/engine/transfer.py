"""How bytes get from tensors into the arena: copied by this thread on the CPU, by a side stream on CUDA.

A side stream waits, on the device, for what the training stream has queued when a snapshot is asked for, and
the training stream never waits for it. The arena is page-locked once, so that transfers are asynchronous.
"""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

log = logging.getLogger("holdfast.checkpoint")

_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered: another saver of this process did it


class Transfer:
    """One capture thread's way into the arena."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._locked: Any = None

    def follow(self, devices: Iterable[torch.device]) -> None:
        """Let later copies see what the training thread, which calls this, has queued by now."""
        for device in {device for device in devices if device.type == "cuda"}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def prepare(self, space: memoryview) -> None:
        """Page-lock the arena that a region lies in, the first time that one of it is used."""
        if not self._streams or space.obj is self._locked:
            return
        self.release()
        arena = np.frombuffer(memoryview(space.obj), np.uint8)
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
        code = int(cuda.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0))
        if code not in (0, _ALREADY_REGISTERED):
            log.warning("CUDA error %d: the arena cannot be page-locked; copies will be slow", code)
        self._locked = space.obj

    def release(self) -> None:
        """Give page-locked memory back."""
        if self._locked is not None:
            self.settle()  # copies of a capture that was given up may still be on their way
            address = np.frombuffer(memoryview(self._locked), np.uint8).ctypes.data
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
            cuda.cudaHostUnregister(address)
            self._locked = None

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
