"""The default job as the peers train it: its micro-batches, a file as its checkpoint, a log of what happened.

Imports nothing of our engine, and no Ray: what a restart of a peer costs is the peer's own.
"""

import json
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

VIRTUAL_RANKS, GLOBAL_BATCH = 8, 16


@dataclass(frozen=True, slots=True)
class Course:
    """Where a peer writes, how far it trains, how often it saves, after which step its last worker dies."""

    directory: Path
    num_steps: int = 13
    every: int = 6
    kill_step: int = 11

    def written(self) -> str:
        """Write it as an argument of a command."""
        return json.dumps(asdict(self), default=str)

    @property
    def log(self) -> Path:
        """Where it is written what happened when."""
        return self.directory / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.directory / "newest.pt"


def read_course(text: str) -> Course:
    """Read what `Course.written` wrote."""
    values = json.loads(text)
    return Course(**{**values, "directory": Path(values["directory"])})


class Answers:
    """Beside a DDP: also answers for its model's attributes, which a job's loss may read."""

    def __getattr__(self, name: str) -> Any:
        above: Any = super()
        try:
            return above.__getattr__(name)
        except AttributeError:
            return getattr(above.__getattr__("module"), name)


class Answering(Answers, DistributedDataParallel):
    """torch's DDP over such a model."""


class Work:
    """The default job's model, optimizer and data on one rank; `course` tells when it dies."""

    def __init__(self, course: Course) -> None:
        _without_face("elastic")
        from elastic.training.gpt import GPTJob, GPTSettings
        from elastic.training.job import Split

        torch.set_num_threads(1)
        settings = GPTSettings()
        each = GLOBAL_BATCH // VIRTUAL_RANKS
        self.course, self._job = course, GPTJob()
        self._dataset = self._job.dataset(
            Split(name="train", source="stdlib", seed=0, micro_batch=each, settings=settings)
        )
        self.model = self._job.model(settings)
        self.optimizer = self._job.optimizer(self.model)
        self._rng = torch.Generator()

    def accumulate(self, ddp: Any, step: int, rank: int, size: int) -> None:
        """Add up the gradients of this rank's micro-batches, reduced with the last one."""
        mine = range(rank, VIRTUAL_RANKS, size)
        for index, virtual_rank in enumerate(mine):
            with _unsynced(ddp, is_last=index == len(mine) - 1):
                self._loss(ddp, self._job.batch(self._dataset, step, virtual_rank), len(mine)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def _loss(self, ddp: Any, batch: Tensor, count: int) -> Tensor:
        return self._job.loss(ddp, batch, self._rng) / count

    def state(self, step: int) -> dict[str, Any]:
        """Return all of it, as torch saves it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}

    def load(self, path: Path) -> int:
        """Take the state of a checkpoint over, if there is one; return its step."""
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return int(saved["step"])

    def tell(self, step: int, rank: int, life: int) -> None:
        """Note a step's end; `life` tells how often the job began again, or went on without somebody."""
        tell(self.course, "step", step, rank, life)

    def die(self, step: int, rank: int) -> None:
        """Note it, and be SIGKILLed."""
        tell(self.course, "kill", step, rank, 0)
        os.kill(os.getpid(), signal.SIGKILL)


def tell(course: Course, what: str, step: int, rank: int, life: int) -> None:
    """Append one line; small appends do not mix."""
    with course.log.open("a") as file:
        line = {"time": time.monotonic(), "life": life, "step": step, "rank": rank, "what": what}
        file.write(json.dumps(line) + "\n")


def _unsynced(ddp: Any, *, is_last: bool) -> AbstractContextManager[None]:
    found: AbstractContextManager[None] = nullcontext() if is_last else ddp.no_sync()
    return found


def _without_face(name: str) -> None:
    """Let `name`'s modules be imported without its __init__, which loads Ray."""
    package = ModuleType(name)
    package.__path__ = [str(Path(__file__).parents[3] / name)]
    sys.modules[name] = package
