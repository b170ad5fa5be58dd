"""Ray, and nothing else: find or start the cluster, start members as named actors, hear them, end them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication import authentication_token_setup as authentication
from ray.exceptions import RayActorError, RayError

from elastic.control.events import Cause, Event, MemberLost
from elastic.errors import TrainingFailed
from elastic.runtime import warden
from elastic.runtime.notices import LogLine
from elastic.runtime.order import TrainOrder
from elastic.runtime.worker import Assignment, Member

log = logging.getLogger("holdfast.cluster")
LOOPBACK = "127.0.0.1"
START_LIMIT_S = 120.0
POLL_S = 0.5
WARDEN_GRACE_S = 15.0
SURELY_DEAD_S = 1.0


class Actor(Member):
    """A member in a Ray actor: it learns from Ray on which node it runs."""

    def __init__(self, member: str, order: TrainOrder) -> None:
        # A local Ray's node has another id each time, but the host's keeper may still be there.
        is_local = order.cluster.address is None
        host = "local" if is_local else ray.get_runtime_context().get_node_id()[:12]
        super().__init__(Assignment(member, host, _own_address(order), order))


@dataclass(slots=True)
class Seat:
    """A member's actor, the call that waits for its next news, and when it last answered."""

    actor: Any
    call: Any
    heard_at: float


class Cluster:
    """The run's members on Ray.

    Actors are detached and named in the run's own namespace, so a later driver finds them.

    Without an address a local Ray is started under a warden in a session of its own; its files lie in
    `run_dir/ray`.
    """

    def __init__(self, order: TrainOrder) -> None:
        self._order = order
        self._directory = order.run_dir / "ray"
        self._seats: dict[str, Seat] = {}
        self._is_local = order.cluster.address is None
        self._warden: subprocess.Popen[bytes] | None = None
        _connect(order.cluster.address or self._join_or_start(), order.run)

    @property
    def address(self) -> str:
        """The driver's own network address, where members can reach it."""
        return _own_address(self._order)

    def find(self) -> list[str]:
        """Return the living members that an earlier driver of this run left, and greet them."""
        names: list[str] = [str(name) for name in ray.util.list_named_actors()]
        for name in names:
            self._seat(name, ray.get_actor(name))
            self._seats[name].actor.greet.remote()
        return names

    def start(self, member: str) -> None:
        """Start a member's process. Whether it came up is heard from its first news."""
        cluster = self._order.cluster
        actor = (
            ray.remote(Actor)
            .options(
                name=member,
                lifetime="detached",
                max_concurrency=8,
                max_restarts=0,
                num_cpus=cluster.threads_per_worker,
                num_gpus=cluster.gpus_per_worker,
                scheduling_strategy="SPREAD",
                runtime_env=_runtime_env(self._order),
            )
            .remote(member, self._order)
        )
        self._seat(member, actor)

    def tell(self, member: str, method: str, *arguments: object) -> None:
        """Call a member without waiting; one that is gone is heard of as lost."""
        if member in self._seats:
            getattr(self._seats[member].actor, method).remote(*arguments)

    def hear(self, timeout_s: float) -> Iterator[Event | LogLine]:
        """Yield what members tell, and that members are lost, within about `timeout_s`."""
        calls = {seat.call: member for member, seat in self._seats.items()}
        if not calls:
            time.sleep(timeout_s)
            return
        done, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        more, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for call in dict.fromkeys([*done, *more]):
            yield from self._read(calls[call], call)

    def silent(self, limit_s: float) -> tuple[str, ...]:
        """Name the members that have not answered for `limit_s`."""
        now = time.monotonic()
        return tuple(member for member, seat in self._seats.items() if now - seat.heard_at > limit_s)

    def kill(self, member: str) -> None:
        """End a member's process."""
        seat = self._seats.pop(member, None)
        if seat is not None:
            ray.kill(seat.actor)

    def renew(self) -> None:
        """Keep the local Ray alive for another lease."""
        if self._is_local:
            (self._directory / warden.LEASE).touch()

    def detach(self) -> None:
        """Let go of the run without ending anything; the workers and the local Ray have their lease."""
        ray.shutdown()
        if self._warden is not None:
            self._warden.returncode = 0  # it lives on, so nobody here has to wait for it

    def end(self) -> None:
        """End all members, and the local Ray if there is one."""
        for member in list(self._seats):
            self.kill(member)
        ray.shutdown()
        if self._is_local:
            _end_warden(self._directory)
            if self._warden is not None:
                self._warden.wait()

    def _seat(self, member: str, actor: Any) -> None:
        self._seats[member] = Seat(actor, actor.poll.remote(POLL_S), time.monotonic())

    def _read(self, member: str, call: Any) -> Iterator[Event | LogLine]:
        seat = self._seats[member]
        try:
            news: list[Event | LogLine] = ray.get(call)
        except RayActorError as error:
            del self._seats[member]
            yield MemberLost(member, _cause(error), _evidence(error))
            return
        seat.heard_at = time.monotonic()
        seat.call = seat.actor.poll.remote(POLL_S)
        yield from news

    def _join_or_start(self) -> str:
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


def _own_address(order: TrainOrder) -> str:
    """Return the address at which members on this node are reached; a local Ray needs no other node."""
    if order.cluster.address is None:
        return LOOPBACK
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no types here


def _connect(address: str, namespace: str) -> None:
    """Join a cluster; Ray replaces the process's SIGTERM handler meanwhile, which is put back.

    A Ray that was started locally demands this user's token, which Ray does not show to an explicit address
    of its own accord.
    """
    handler = signal.getsignal(signal.SIGTERM)
    logging.getLogger(authentication.__name__).setLevel(logging.ERROR)  # it warns of what is the default
    authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
        # Else it prints each lost worker, with general advice.
        ray._private.worker.print_to_stdstream = _log  # type: ignore[assignment]  # Ray names its option
    except (RayError, OSError, RuntimeError) as error:
        raise TrainingFailed(
            f"cannot reach the Ray cluster at {address}: {error}; check world.address"
        ) from error
    finally:
        if handler is not None:
            _restore(handler)


def _log(data: dict[str, Any], **_: object) -> None:
    log.debug("Ray: %s", data.get("lines"))


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


def _restore(handler: Any) -> None:
    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:
        log.debug("not in the main thread: Ray has not touched the handler")


def _runtime_env(order: TrainOrder) -> dict[str, Any]:
    threads = str(order.cluster.threads_per_worker)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if order.cluster.address is None:
        paths = [str(order.job.code_dir), *(path for path in sys.path if Path(path).is_dir())]
        return {"env_vars": {**variables, "PYTHONPATH": os.pathsep.join(paths)}}
    if order.job.path.startswith("elastic."):
        return {"env_vars": variables}
    return {
        "env_vars": variables,
        "working_dir": str(order.job.code_dir),
        "excludes": ["runs", ".venv", ".git"],
    }


def _cause(error: RayActorError) -> Cause:
    text = str(error)
    if "creation task" in text or "__init__" in text:
        return Cause.START_FAILED
    return Cause.HOST_DIED if "node has died" in text else Cause.PROCESS_DIED


def _evidence(error: RayActorError) -> str:
    """Take the sentence in which Ray says why, leaving out its general advice."""
    text = " ".join(str(error).split())
    reason = text[text.find("The actor is dead because") :] if "The actor is dead because" in text else text
    return f"Ray: {reason.split(' Some common causes')[0][:300]}"


def _start_warden(directory: Path, order: TrainOrder) -> subprocess.Popen[bytes]:
    num_cpus = (order.world.workers + 2) * order.cluster.threads_per_worker
    num_gpus = round(order.world.workers * order.cluster.gpus_per_worker)
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
