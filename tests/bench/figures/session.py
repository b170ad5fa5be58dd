"""The driver's side: worker processes that take turns, in rounds whose order rotates."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

ROOT = Path(__file__).parents[3]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
OURS, OURS_CODEC, OURS_MEMORY = "holdfast", "holdfast, codec", "holdfast, memory"
CONTROL = "raw write + fsync"
PEERS = (
    "torch.save",
    "safetensors",
    "dcp.save",
    "dcp.async_save",
    "dcp.async_save, reused stager",
    "dcp.async_save, async stager",
    "torchsnapshot.async_take",
)
GIB = 1 << 30
_ARENA_SHARE = 2.25  # of the state: one snapshot is captured while the one before is written
_LOG_TAIL = 2000

console = Console()
Turn = TypeVar("Turn")


class Worker:
    """One training process, asked one thing at a time."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def ask(self, verb: str, **options: Any) -> Any:
        """Let it do something, and return its answer. Raises RuntimeError with its last words if it died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a worker without pipes")
        try:
            stdin.write(json.dumps({"verb": verb, "options": options}) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the worker died at {verb} {options}:\n{self._log.read_text()[-_LOG_TAIL:]}")
        return json.loads(answer)

    def end(self) -> None:
        """Let it clean up and end."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class Lane:
    """An engine and the worker it runs in."""

    engine: str
    worker: Worker

    def ask(self, verb: str, **options: Any) -> Any:
        """Let the worker do something with this engine."""
        return self.worker.ask(verb, engine=self.engine, **options)


class Session:
    """The worker with our engines and the controls, and the one with the peers where they are installed."""

    def __init__(self, ours: Worker, peers: Worker | None) -> None:
        self.ours = ours
        self.peers = peers
        self._products_per_s = float(ours.ask("calibrate"))

    def lanes(
        self, num_bytes: int, num_tensors: int, engines: Sequence[str], device: str = "cpu"
    ) -> list[Lane]:
        """Give all workers that the engines need a state of this size, and open the engines in them."""
        lanes = []
        for worker, known in ((self.ours, None), (self.peers, PEERS)):
            chosen = [engine for engine in engines if (engine in PEERS) == (known is not None)]
            if worker is None or not chosen:
                continue
            worker.ask("make", num_bytes=num_bytes, num_tensors=num_tensors, device=device)
            lanes += [Lane(engine, worker) for engine in chosen]
        for lane in lanes:
            arena = {} if lane.engine in PEERS else {"arena_bytes": arena_bytes(num_bytes)}
            lane.ask("open", **arena)
        return sorted(lanes, key=lambda lane: list(engines).index(lane.engine))

    def products(self, step_s: float) -> int:
        """Return how many products make a step of this length."""
        return max(1, round(self._products_per_s * step_s))

    def close(self) -> None:
        """Let the workers give their memory back."""
        for worker in (self.ours, self.peers):
            if worker is not None:
                worker.ask("close")


def arena_bytes(num_bytes: int) -> int:
    """Return the budget of our keeper for a state of this size."""
    return int(num_bytes * _ARENA_SHARE)


def rounds(num_rounds: int, turns: Sequence[Callable[[], None]]) -> None:
    """Let everyone have a turn in each round, each time beginning with the next one."""
    for number in range(num_rounds):
        first = number % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            turn()


@contextmanager
def session() -> Iterator[Session]:
    """Start the workers, and end them."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory, ExitStack() as stack:
        ours = _started(Path(sys.executable), "ours", Path(directory), stack)
        peers = None
        if PEERS_PYTHON.exists():
            peers = _started(PEERS_PYTHON, "peers", Path(directory), stack)
        else:
            console.print("no .venv-peers: without the peers' figures (`make bench-peers` installs them)")
        yield Session(ours, peers)


def _started(python: Path, whose: str, directory: Path, stack: ExitStack) -> Worker:
    folder, log = directory / whose, directory / f"{whose}.log"
    folder.mkdir(mode=0o700)
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [str(python), "-m", "tests.bench.peers.worker", whose, str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    worker = Worker(process, log)
    stack.callback(worker.end)
    return worker
