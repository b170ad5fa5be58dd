"""A training process that saves with the engine it is told: `worker ours|peers FOLDER`.

One line of JSON comes in, one goes out, so that one driver can let several processes take turns.
"""

import ctypes
import importlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.peers.spares import Spares
from tests.bench.peers.training import Engine, State, Step, digest, make_state, synchronize

_MODULES = {"ours": "tests.bench.peers.ours", "peers": "tests.bench.peers.engines"}


class Worker:
    """One process's state and engines; every method that has a reply is a verb."""

    def __init__(self, whose: str, folder: Path) -> None:
        self._opening = importlib.import_module(_MODULES[whose])
        self._folder = folder
        self._spares = Spares(folder.parent / "spares")
        self._state: State = {}
        self._num_bytes = 0
        self._step = 0
        self._engines: dict[str, Engine] = {}
        self._saved: dict[str, tuple[int, str]] = {}
        self._training = Step("cpu")

    def make(self, num_bytes: int, num_tensors: int, device: str) -> None:
        """Make the state, in place of the last one."""
        self.close()
        _trim()  # else what was freed before would hide what an engine takes
        self._state = make_state(num_bytes, num_tensors, device)
        self._num_bytes = num_bytes
        self._training = Step(device)

    def calibrate(self) -> float:
        """Return how many matrix products a second is worth."""
        return self._training.products_per_s()

    def open(self, engine: str, **options: Any) -> None:
        """Make an engine ready."""
        folder = self._folder / str(len(self._engines))
        folder.mkdir(mode=0o700)
        self._engines[engine] = self._opening.open_engine(engine, folder, **options)

    def close(self) -> None:
        """Close all engines and remove what they wrote."""
        for number, engine in enumerate(self._engines.values()):
            engine.close()
            shutil.rmtree(self._folder / str(number))
        self._engines.clear()
        self._spares.clear()
        self._state = {}

    def train(
        self, engine: str, num_steps: int, every: int, num_products: int, warm_bytes: int = 0
    ) -> dict[str, Any]:
        """Take steps, each beginning with a checkpoint if it is its turn, and before that with warm memory.

        Returns seconds: `blocked` of each checkpoint, `wall` and (this thread's) `cpu` of all steps. Waits
        until all are durable.
        """
        keeping, blocked, wall, cpu = self._engines[engine], [], 0.0, 0.0
        for index in range(num_steps):
            self._step += 1
            is_due = index % every == 0
            if is_due:
                self._saved[engine] = (self._step, digest(self._state))
                self._spares.free(warm_bytes)
            synchronize(self._state.values())
            started, cpu_started = time.perf_counter(), time.thread_time()
            if is_due:
                keeping.save(self._state, self._step)
            saved = time.perf_counter()
            self._training.compute(num_products)
            synchronize(self._state.values())
            computed = time.perf_counter()
            keeping.fence()
            fenced = time.perf_counter()
            self._training.update(self._state)
            wall += time.perf_counter() - started
            cpu += time.thread_time() - cpu_started
            if is_due:
                blocked.append(saved - started + fenced - computed)
        keeping.settle()
        return {"blocked": blocked, "wall": wall, "cpu": cpu}

    def warm(self, engine: str) -> None:
        """Warm as much memory as a checkpoint takes."""
        self._spares.free(self._num_bytes)

    def persist(self, engine: str) -> float:
        """Return the seconds from asking for one checkpoint until it is durable, with nothing else to do."""
        self._training.update(self._state)  # a restored state is what was saved, and dedup has that already
        self._step += 1
        self._saved[engine] = (self._step, digest(self._state))
        self._spares.free(self._num_bytes)
        started = time.perf_counter()
        self._engines[engine].save(self._state, self._step)
        self._engines[engine].fence()
        self._engines[engine].settle()
        seconds = time.perf_counter() - started
        self._training.update(self._state)
        return seconds

    def restore(self, engine: str) -> dict[str, Any]:
        """Restore the newest checkpoint over a state that changed since.

        Returns the seconds, whether it `is_equal`, and the bytes of memory it took at its peak.
        """
        step, expected = self._saved[engine]
        _trim()  # as in a process that has just started, which is when one restores
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now (proc(5))
        before = _status_bytes("VmHWM")
        started = time.perf_counter()
        restored = self._engines[engine].restore(self._state, step)
        seconds = time.perf_counter() - started
        extra_bytes = _status_bytes("VmHWM") - before
        return {"seconds": seconds, "is_equal": digest(restored) == expected, "extra_bytes": extra_bytes}

    def drop(self, engine: str) -> None:
        """Take away what an engine wrote: the next one's memory."""
        folder = self._folder / str(list(self._engines).index(engine))
        for part in folder.iterdir():
            if part.name != "keeper":
                self._spares.keep(part)
        os.sync()  # so that nothing of it is left to the next one's fsync

    def memcpy(self) -> float:
        """Return the seconds of a copy of the state into memory that was touched before."""
        copies = [torch.empty_like(tensor, device="cpu").fill_(0) for tensor in self._state.values()]
        started = time.perf_counter()
        for copy, tensor in zip(copies, self._state.values(), strict=True):
            copy.copy_(tensor)
        return time.perf_counter() - started

    def processes(self, engine: str) -> list[int]:
        """Return the processes whose memory the training pays for."""
        config = getattr(self._engines.get(engine), "config", None)
        return [os.getpid(), *([int(config.life_lock_path.read_text())] if config else [])]


def _trim() -> None:
    """Give freed memory back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main(whose: str, folder: Path) -> None:
    """Answer commands until the input ends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    worker = Worker(whose, folder)
    for line in sys.stdin:
        command: Mapping[str, Any] = json.loads(line)
        reply = getattr(worker, command["verb"])(**command["options"])
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    worker.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
