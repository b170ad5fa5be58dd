"""The border to the user's code: what it raises is the job's failure, unless hardware did it.

A job's failure would happen elsewhere too: it ends the run, told once. A machine's ends its worker, and
another takes its place.
"""

import errno
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastic.errors import JobRejected
from elastic.training.ports import Broken

_NO_MEMORY = "DefaultCPUAllocator"
_HARDWARE = (
    "ECC error",
    "NVLink error",
    "hardware stack error",
    "GPU is lost",
    "busy or unavailable",
    "no CUDA-capable device",
)
_HARDWARE_ERRNOS = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE})


class UserFailure(Exception):
    """The job's own code raised, in one step and virtual rank (-1: outside of any). Carries text only."""

    def __init__(self, step: int, virtual_rank: int, what: str, trace: str) -> None:
        super().__init__(f"the job failed {_place(step, virtual_rank)}: {what}")
        self.step = step
        self.virtual_rank = virtual_rank
        self.traceback = trace


class MachineFailure(Exception):
    """The job's code met a fault of its machine, of which another machine is free. Carries text only."""


@contextmanager
def blaming_the_job(step: int, virtual_rank: int = -1) -> Iterator[None]:
    """Turn whatever the job's code raises into UserFailure, or into MachineFailure for a fault of hardware.

    Whatever: it may exit, be cancelled, or panic. Inside of a sharded model a world may break.
    """
    try:
        yield
    except (Broken, JobRejected, UserFailure):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # a person's, not the job's
        if is_of_the_machine(error):
            raise MachineFailure(f"{_place(step, virtual_rank)}: {explain(error)}") from None
        raise UserFailure(step, virtual_rank, explain(error), traceback.format_exc()) from None


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error tells of broken hardware, in the words of CUDA or the system."""
    if isinstance(error, OSError):
        return error.errno in _HARDWARE_ERRNOS
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HARDWARE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that memory was asked for that is not there, the device's or the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY in str(error)


def explain(error: BaseException) -> str:
    """Say in a line what was raised, and what to do if memory ran out."""
    line = (str(error).splitlines() or [""])[0]
    what = f"{type(error).__name__}: {line}"
    if not is_out_of_memory(error):
        return what
    return (
        f"{what}; this needs more memory than the machine has: take smaller micro-batches (a larger "
        "training.virtual_ranks or a smaller training.global_batch), a smaller model, or larger machines"
    )


def _place(step: int, virtual_rank: int) -> str:
    return f"in step {step}, virtual rank {virtual_rank}" if virtual_rank >= 0 else f"at step {step}"
