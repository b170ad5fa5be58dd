"""A Ray of the run's own, on this machine: joined if it lives, started under a warden if not."""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from elastic.errors import TrainingFailed
from elastic.runtime import warden
from elastic.runtime.order import TrainOrder

log = logging.getLogger("holdfast.cluster")
START_LIMIT_S = 120.0
WARDEN_GRACE_S = 15.0
SURELY_DEAD_S = 1.0
_PART = 1e-4  # of a GPU: the least that Ray tells apart


class LocalRay:
    """The local Ray of one run, in a session of its own, with a lease; its files lie in `run_dir/ray`."""

    def __init__(self, order: TrainOrder) -> None:
        self._order = order
        self._directory = order.run_dir / "ray"
        self._warden: subprocess.Popen[bytes] | None = None

    def join_or_start(self) -> str:
        """Return the address of the local Ray there is, or of a new one in place of a dead one."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self.renew()
        address = self._directory / warden.ADDRESS
        known = address.read_text() if address.exists() else ""
        if known and _is_well(self._directory, known):
            return known
        _end_warden(self._directory)
        address.unlink(missing_ok=True)
        self._warden = _start_warden(self._directory, self._order)
        return _await_address(self._directory)

    def renew(self) -> None:
        """Keep it alive for another lease."""
        (self._directory / warden.LEASE).touch()

    def is_dead(self) -> bool:
        """Whether it has ended: its warden does not outlive it."""
        return not _is_warden(_warden_pid(self._directory), self._directory)

    def detach(self) -> None:
        """Let go of it; it lives on for its lease."""
        if self._warden is not None:
            self._warden.returncode = 0  # nobody here has to wait for it

    def end(self) -> None:
        """End it, and wait until it has ended."""
        _end_warden(self._directory)
        if self._warden is not None:
            self._warden.wait()


def _is_well(directory: Path, address: str) -> bool:
    """Whether the local Ray lives, and goes on to for a second: what was just killed still answers while it
    dies.
    """
    until = time.monotonic() + SURELY_DEAD_S
    while _is_warden(_warden_pid(directory), directory) and _answers(address):
        if time.monotonic() > until:
            return True
        time.sleep(0.1)
    log.warning("the local Ray is gone or does not answer; starting another")
    return False


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself tries for minutes to reach a cluster that is gone."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True


def choose_num_gpus(order: TrainOrder, num_here: int) -> int:
    """Choose the GPUs that a local Ray has to give: what workers and standbys take, or what the machine has.

    On a machine without any they only count, as workers compute on its CPU.
    """
    num_members = order.world.workers + order.world.standbys
    per_worker = order.cluster.gpus_per_worker
    if 0 < per_worker < 1:  # Ray gives a worker parts of one GPU only, whatever is left of others
        num_taken = math.ceil(num_members / math.floor(1 / per_worker + _PART))
    else:
        num_taken = math.ceil(num_members * per_worker)
    if num_taken > num_here:
        log.warning(
            "%d workers and %d standbys take %d GPUs, and this machine has %s: %s",
            order.world.workers,
            order.world.standbys,
            num_taken,
            num_here or "none",
            "not all of them can start" if num_here else "they compute on its CPU",
        )
    return min(num_taken, num_here) if num_here else num_taken


def _start_warden(directory: Path, order: TrainOrder) -> subprocess.Popen[bytes]:
    num_cpus = (order.world.workers + order.world.standbys + 2) * order.cluster.threads_per_worker
    num_gpus = choose_num_gpus(order, torch.cuda.device_count()) if order.cluster.gpus_per_worker else 0
    arguments = [str(directory), str(num_cpus), str(num_gpus), str(order.lease_s + WARDEN_GRACE_S)]
    with (directory / "warden.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", warden.__file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    warden.publish(directory / "pid", str(process.pid))
    return process


def _await_address(directory: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    pid = _warden_pid(directory)
    while time.monotonic() < deadline and _is_warden(pid, directory):
        if (directory / warden.ADDRESS).exists():
            return (directory / warden.ADDRESS).read_text()
        time.sleep(0.05)
    raise TrainingFailed(f"the local Ray did not start; its log is {directory / 'warden.log'}")


def _warden_pid(directory: Path) -> int | None:
    path = directory / "pid"
    return int(path.read_text()) if path.exists() else None


def _is_warden(pid: int | None, directory: Path) -> bool:
    """Whether this process lives and is this directory's warden (numbers are given again)."""
    if pid is None:
        return False
    try:
        process = psutil.Process(pid)
        command = process.cmdline()  # empty for a moment while it starts
        is_ours = warden.__file__ in command and str(directory) in command
        return process.status() != psutil.STATUS_ZOMBIE and (is_ours or not command)
    except psutil.NoSuchProcess:
        return False


def _end_warden(directory: Path) -> None:
    pid = _warden_pid(directory)
    if pid is None or not _is_warden(pid, directory):
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + WARDEN_GRACE_S
    while _is_warden(pid, directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    if _is_warden(pid, directory):
        os.kill(pid, signal.SIGKILL)
