"""A tiny job whose process may SIGKILL itself on entering, or on leaving, a named function: any phase of a
step.

A profile function watches the calls of the training and of the threads that it starts, so the product needs
no hook for it.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

WIDTH = 32


@dataclass(frozen=True)
class Doom:
    """One death: of the first process to come to `event` of `function` once the doom is armed.

    A newcomer, which has computed nothing yet, dies only of a doom with `newcomer`. With `hangs` the process
    lives on and answers, but its training does not.
    """

    name: str
    function: str
    event: str = "call"
    newcomer: bool = False
    hangs: bool = False

    def arm(self, marks: Path) -> None:
        """Let it strike from now on."""
        (marks / f"{self.name}.armed").touch()

    def has_struck(self, marks: Path) -> bool:
        """Whether a process has died of it, or is about to."""
        return (marks / self.name).exists()


@dataclass(frozen=True)
class Settings:
    """`marks` is the directory in which dooms are claimed; a micro-batch takes `pause_s` longer. Whoever
    comes to the first one of step `deadly_at` dies.
    """

    pause_s: float = 0.0
    marks: str = ""
    dooms: tuple[Doom, ...] = ()
    deadly_at: int = -1


class Tiny(nn.Module):
    """A small network with dropout, so that randomness matters."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        if out.requires_grad:
            out.register_hook(in_backward)
        return out


def in_backward(gradient: Tensor) -> Tensor:
    """Be a function that is called in the middle of backward."""
    return gradient


def wait_for_ever() -> None:
    """Be the deadlock that a stack dump should show."""
    threading.Event().wait()


@dataclass(frozen=True)
class Data:
    """Nothing but what it takes to make a batch."""

    size: int
    seed: int


class DoomedJob:
    """Fits noise; dies as its settings say."""

    settings = Settings

    def __init__(self) -> None:
        self._settings = Settings()
        self._step: int | None = None

    def model(self, settings: Settings) -> nn.Module:
        self._settings = settings
        if settings.dooms:
            sys.setprofile(self._watch)
            threading.setprofile(self._watch)  # the reduction runs in a thread beside
        return Tiny()

    def optimizer(self, model: nn.Module) -> AdamW:
        return AdamW(model.parameters(), lr=1e-3)

    def dataset(self, split: Any) -> Data:
        return Data(split.micro_batch, split.seed)

    def batch(self, dataset: Data, step: int, virtual_rank: int) -> Tensor:
        self._step = step
        if (step, virtual_rank) == (self._settings.deadly_at, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(dataset.seed * 1_000_003 + step * 997 + virtual_rank)
        return torch.randn(dataset.size, WIDTH, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor, rng: torch.Generator) -> Tensor:
        time.sleep(self._settings.pause_s)
        loss: Tensor = (model(batch) - batch.roll(1, dims=1)).square().mean()
        return loss

    def _watch(self, frame: FrameType, event: str, _: object) -> None:
        for doom in self._settings.dooms:
            if doom.event == event and frame.f_code.co_qualname == doom.function and self._is_due(doom):
                if doom.hangs:
                    wait_for_ever()
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_due(self, doom: Doom) -> bool:
        """Claim a doom that is due; exactly one process can."""
        marks = Path(self._settings.marks)
        if doom.newcomer != (self._step is None) or not (marks / f"{doom.name}.armed").exists():
            return False
        try:
            os.close(os.open(marks / doom.name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
