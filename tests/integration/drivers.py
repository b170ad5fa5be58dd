"""Runs to kill: their drivers are processes in sessions of their own, and nothing of them is left behind.

No test drives a run in its own process: Ray ends a process that loses it, and would take all tests along.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import elastic

Drive = Callable[..., subprocess.Popen[bytes]]


@contextmanager
def driving(directory: Path) -> Iterator[Drive]:
    """Give a function that starts a run's driver; what is left of the runs is killed in the end."""
    started: list[tuple[elastic.TrainOrder, subprocess.Popen[bytes]]] = []

    def start(order: elastic.TrainOrder, module: str = "drive") -> subprocess.Popen[bytes]:
        path = directory / f"{order.run}-{len(started)}.pickle"
        path.write_bytes(pickle.dumps(order))
        command = [sys.executable, "-m", f"tests.integration.{module}", str(path)]
        with path.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        started.append((order, process))
        return process

    try:
        yield start
    finally:
        for order, process in started:
            kill_group(process)
            kill_ray(order)


def finish(order: elastic.TrainOrder) -> elastic.TrainReport:
    """Drive a run to its end, and return what it reports; a driver that fails shows what it said."""
    status, said = drive_to_its_end(order)
    assert status == 0, said
    return elastic.read_report(order.run_dir)


def drive_to_its_end(order: elastic.TrainOrder, module: str = "drive") -> tuple[int, str]:
    """Drive a run until its driver ends; return the driver's exit status and what it said."""
    order.run_dir.mkdir(parents=True, exist_ok=True)
    with driving(order.run_dir) as drive:
        status = drive(order, module).wait()
        return status, (order.run_dir / f"{order.run}-0.log").read_text()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a driver with its whole process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_ray(order: elastic.TrainOrder) -> None:
    """SIGKILL the run's local Ray: its warden and everything below it, workers included."""
    pid = order.run_dir / "ray" / "pid"
    if pid.exists() and psutil.pid_exists(int(pid.read_text())):
        warden = psutil.Process(int(pid.read_text()))
        for process in [*warden.children(recursive=True), warden]:
            process.kill()


def await_step(
    order: elastic.TrainOrder, step: int, process: subprocess.Popen[bytes], durable: int | None = 1
) -> None:
    """Wait until the journal tells that a step is committed and, unless None, that one as late is durable."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "the driver ended too early"
        if (order.run_dir / "journal.jsonl").exists():
            report = elastic.read_report(order.run_dir)
            is_durable = durable is None or (report.newest_durable_step or 0) >= durable
            if report.committed_steps >= step and is_durable:
                return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")


def await_no_keeper(order: elastic.TrainOrder) -> None:
    """Wait until the keepers of a run that is over have ended by themselves."""
    deadline = time.monotonic() + 60
    while living := [one.pid for one in psutil.process_iter(["cmdline"]) if _is_keeper(one, order)]:
        assert time.monotonic() < deadline, f"keepers {living} outlive their run"
        time.sleep(0.1)


def _is_keeper(process: psutil.Process, order: elastic.TrainOrder) -> bool:
    arguments = process.info["cmdline"] or []
    return "checkpoint.keeper" in arguments and any(str(order.run_dir) in one for one in arguments)
