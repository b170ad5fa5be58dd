"""Who is blamed for what the job's code raises: the job, once and clearly, or the machine it ran on."""

import errno
from asyncio import CancelledError
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from elastic.training.blame import MachineFailure, UserFailure, blaming_the_job, is_out_of_memory

ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"


def raised_as(error: BaseException) -> Exception:
    """Let the job's code raise something, and return what becomes of it."""
    try:
        with blaming_the_job(3, 1):
            raise error
    except (UserFailure, MachineFailure) as failure:
        return failure


def no_memory_of_torch() -> object:
    return torch.empty(1 << 50)


def no_memory_of_numpy() -> object:
    return np.empty(1 << 58)


def no_memory_of_a_device() -> object:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("asks", [no_memory_of_torch, no_memory_of_numpy, no_memory_of_a_device])
def test_a_job_that_needs_more_memory_than_there_is_is_told_so_with_what_to_do(asks):
    told = r"step 3, virtual rank 1: .*smaller micro-batches"
    with pytest.raises(UserFailure, match=told) as caught, blaming_the_job(3, 1):
        asks()
    assert asks.__name__ in caught.value.traceback
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ECC),
        RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        OSError(errno.EIO, "Input/output error", "/data/tokens.bin"),
        OSError(errno.ESTALE, "Stale file handle", "/data/tokens.bin"),
    ],
)
def test_a_fault_of_hardware_is_the_machines_though_the_jobs_code_met_it(error):
    failure = raised_as(error)
    assert isinstance(failure, MachineFailure)
    assert str(failure).startswith("in step 3, virtual rank 1: ")
    assert "\n" not in str(failure)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("no such luck"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/tokens.bin"),
        PermissionError(errno.EACCES, "Permission denied", "/data/tokens.bin"),
    ],
)
def test_whatever_would_happen_elsewhere_too_is_the_jobs(error):
    failure = raised_as(error)
    assert isinstance(failure, UserFailure)
    assert type(error).__name__ in str(failure)
    assert not is_out_of_memory(error)


class PanicException(BaseException):
    """As extensions in Rust raise it."""


@pytest.mark.parametrize(
    "error", [SystemExit(3), CancelledError(), PanicException("index out of bounds"), KeyboardInterrupt()]
)
def test_what_no_ordinary_handler_catches_is_the_jobs_too_where_it_trains(error):
    def raised() -> Any:
        return raised_as(error)

    with ThreadPoolExecutor(1) as training:
        failure = training.submit(raised).result()
    assert isinstance(failure, UserFailure)
    assert str(failure).startswith(f"the job failed in step 3, virtual rank 1: {type(error).__name__}")
    assert "in raised_as" in failure.traceback


def test_whoever_interrupts_the_main_thread_is_a_person():
    with pytest.raises(KeyboardInterrupt), blaming_the_job(3, 1):
        raise KeyboardInterrupt


def test_what_was_judged_already_is_passed_on_as_it_is():
    failure = UserFailure(1, 0, "x", "")
    with pytest.raises(UserFailure) as caught, blaming_the_job(3):
        raise failure
    assert caught.value is failure
