"""A Prefect server of our own, on loopback: in its own session, so that ctrl-C is ours; gone when we are."""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tasks.errors import ServerSilent

LOOPBACK = "127.0.0.1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 5.0
_PR_SET_PDEATHSIG = 1


class Kind(StrEnum):
    """`embedded` serves one command's API; `full` also has the UI, schedules and automations."""

    EMBEDDED = "embedded"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Server:
    """A server process of ours and where it answers."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def api_url(self) -> str:
        """What Prefect's clients are told."""
        return f"{self.address}/api"

    def await_health(self) -> None:
        """Wait until the server answers. Raises ServerSilent if it ends or takes too long."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if is_healthy(self.address):
                return
            time.sleep(0.1)
        raise ServerSilent(f"the Prefect server at {self.address} did not come up; its log is {self.log}")

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_or_start(kind: Kind, port: int, environment: MutableMapping[str, str]) -> Server | None:
    """Have a Prefect API, and name it in the environment: one of our own, or the one there is.

    There is one if the environment names it, or if it answers on the port; then None is returned. `port` 0
    takes a free one. Raises ServerSilent if the port is taken by something else.
    """
    if environment.get("PREFECT_API_URL"):
        return None
    address = f"http://{LOOPBACK}:{port}"
    if port and is_healthy(address):
        environment["PREFECT_API_URL"] = f"{address}/api"
        return None
    if port and not is_free(port):
        raise ServerSilent(
            f"port {port} is taken by something that is no Prefect server; choose another with --port"
        )
    home = Path(environment.get("PREFECT_HOME", "~/.prefect")).expanduser()
    server = _start(kind, port or _free_port(), home / f"holdfast-{kind}.log", environment)
    environment["PREFECT_API_URL"] = server.api_url
    # Prefect delivers its last logs and events at exit, in handlers registered later, thus run earlier.
    atexit.register(server.stop)
    return server


def is_healthy(address: str) -> bool:
    """Whether a Prefect server answers at this address."""
    try:
        with urllib.request.urlopen(f"{address}/api/health", timeout=2.0) as answer:
            return bool(answer.read().strip() == b"true")
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _start(kind: Kind, port: int, log: Path, environment: Mapping[str, str]) -> Server:
    address = f"http://{LOOPBACK}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", kind, str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Without a word, the UI would look for its API on the default port.
            env={**environment, "PREFECT_UI_API_URL": f"{address}/api"},
        )
    return Server(address, process, log)


def is_free(port: int) -> bool:
    """Whether nothing listens on this port of the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _die_with(parent: int) -> None:
    """Ask Linux to end this process when its parent dies, however it does; elsewhere the parent has to."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that wanted this server is gone")


def _serve(kind: Kind, port: int) -> None:
    # Only the server's own process pays for these imports.
    import uvicorn  # noqa: PLC0415
    from prefect.server.api.server import create_app  # noqa: PLC0415

    app = create_app(ephemeral=kind is Kind.EMBEDDED, final=True)
    uvicorn.run(
        app, host=LOOPBACK, port=port, log_level="warning", lifespan="on", timeout_graceful_shutdown=2
    )


if __name__ == "__main__":
    _die_with(int(sys.argv[3]))
    _serve(Kind(sys.argv[1]), int(sys.argv[2]))
