"""A real `holdfast serve` for tests, with its own Prefect home, and its REST API as the UI uses it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_PATIENCE = 20
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def tiny_spec(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Make text in the directory, and the specification of a run on it that trains in a second."""
    text = directory / "text"
    text.mkdir(exist_ok=True)
    for number in range(8):
        (text / f"{number}.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * (200 + number))
    spec: dict[str, dict[str, Any]] = {
        "job": {"settings": {"num_layers": 1, "width": 32, "num_heads": 2, "sequence": 32}},
        "data": {"source": str(text)},
        "training": {"steps": 8, "global_batch": 4, "virtual_ranks": 2},
        "world": {"workers": 2},
        "checkpoint": {"every_steps": 4, "arena_mib": 16},
        "pipeline": {"evaluate_batches": 1},
    }
    return {name: spec.get(name, {}) | sections.get(name, {}) for name in {**spec, **sections}}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a command run for a test, wherever it runs."""
    return {**os.environ, "PREFECT_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}


def command(*arguments: str) -> list[str]:
    """Return the command line of `holdfast` with these arguments."""
    return [sys.executable, "-m", "flows.cli", *arguments]


def as_settings(spec: dict[str, dict[str, Any]]) -> list[str]:
    """Spell a specification as `--set` options."""
    pairs = ((f"{section}.{key}", value) for section, keys in spec.items() for key, value in keys.items())
    return [word for key, value in pairs for word in ("--set", f"{key}={_as_toml(value)}")]


def _as_toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{key} = {_as_toml(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_as_toml, value)) + "]"
        case _:
            return json.dumps(value)


def eventually(look: Callable[[], Any], limit_s: float, what: str) -> Any:
    """Return the first true answer; fail with `what` if none comes in time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(0.25)
    raise AssertionError(f"{what}: not within {limit_s:.0f} s")


@dataclass(frozen=True)
class Serving:
    """A serving command: its address, its working directory, its log."""

    address: str
    directory: Path
    log: Path

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API."""
        request = urllib.request.Request(
            f"{self.address}/api{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        for _ in range(_PATIENCE):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(0.5)  # SQLite is busy; Prefect's own clients come again, too
        raise AssertionError(f"the server was busy {_PATIENCE} times: {method} {path}")

    def deployments(self) -> dict[str, Any]:
        """Return the deployments by name."""
        return {each["name"]: each for each in self.call("POST", "/deployments/filter", {})}

    def trigger(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Start a run as the UI's form does."""
        made = self.call(
            "POST",
            f"/deployments/{self.deployments()[deployment]['id']}/create_flow_run",
            {"parameters": parameters, "state": {"type": "SCHEDULED"}},
        )
        return str(made["id"])

    def flow_runs(self, deployment: str) -> list[Any]:
        """List the flow runs of a deployment, oldest first."""
        wanted = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_ASC"}
        found: list[Any] = self.call("POST", "/flow_runs/filter", wanted)
        return found

    def await_end(self, flow_run: str, limit_s: float) -> Any:
        """Wait until a flow run has ended, and return it."""

        def look() -> Any:
            found = self.call("GET", f"/flow_runs/{flow_run}")
            return found if found["state_type"] in ENDED else None

        return eventually(look, limit_s, f"the end of flow run {flow_run} (log: {self.log})")

    def logs(self, flow_run: str) -> list[Any]:
        """Return the flow run's log records."""
        wanted = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        records: list[Any] = self.call("POST", "/logs/filter", wanted)
        return records

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        """Return the flow run's newest artifacts by type."""
        wanted = {"artifacts": {"flow_run_id": {"any_": [flow_run]}}}
        return {each["type"]: each for each in self.call("POST", "/artifacts/filter", wanted)}


@contextmanager
def serving(directory: Path) -> Iterator[Serving]:
    """Run `holdfast serve` in the directory until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("serve", "--port", str(port)),
            cwd=directory,
            env=environment(directory / "prefect"),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    served = Serving(f"http://127.0.0.1:{port}", directory, log)
    try:
        eventually(lambda: _is_deployed(served, process), 150, f"all deployments (log: {log})")
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_deployed(served: Serving, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, served.log.read_text()
    try:
        return len(served.deployments()) == 6
    except (urllib.error.URLError, OSError):
        return False
