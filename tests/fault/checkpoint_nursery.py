"""Trainers to be killed: a process that has imported everything forks one for each line it reads.

A trainer restores, says what it got, then saves every step through the keeper until it is killed, and says
what was captured, what is durable where, and what went wrong.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpointer, LatestN, Options, Restoration, Saving, Tier
from tests.fault.checkpoint_worlds import run_state, same_bits

EVERY, FAR_EVERY, NUM_KEPT, NUM_HELD, SCALE = 3, 6, 6, 2, 16
FAR = "far"
_MAX_BEHIND = 8  # steps: fates on one tier come in order, so what lags more was lost without a word
_MAX_SPUN = 40_000


def open_run(root: Path) -> Checkpointer:
    """Open the checkpointer of the run that is to be disturbed."""
    tiers = (Tier(str(root / "far"), FAR_EVERY, (LatestN(NUM_KEPT),), FAR),)
    options = Options(tiers=tiers, directory=root / "keeper", lease_s=60.0)
    keep = [LatestN(NUM_KEPT)]
    return Checkpointer(str(root / "store"), every=EVERY, keep=keep, memory=NUM_HELD, options=options)


def state_at(step: int) -> dict[str, Any]:
    """Return the one state that this run has at a step."""
    return run_state(step, SCALE)


class Trainer:
    """One life of a trainer; its diary outlives it."""

    def __init__(self, root: Path, life: int) -> None:
        self._root = root
        self._chance = random.Random(life)
        self._diary = open(root / f"diary{life}", "w", buffering=1, encoding="utf-8")  # noqa: SIM115 -- until the end
        self._undecided: dict[tuple[int, str], Saving] = {}
        self._reached: dict[str, int] = {}  # the newest step that is durable, by tier

    def live(self) -> None:
        """Train until the end of the process."""
        state = state_at(0)
        checkpointer = open_run(self._root)  # never closed: this ends by SIGKILL, or by a bug
        step = self._restored(checkpointer.restore(state), state)
        while True:
            step += 1
            self._update(state, step)
            saving = checkpointer.save(step, state)
            assert saving is not None
            for tier in saving.tiers:
                self._undecided[step, tier] = saving
            sum(range(self._chance.randrange(_MAX_SPUN)))  # the next forward and backward
            checkpointer.wait_captured()
            if saving.captured.exception() is None:
                self._say("captured", step)
            self._tell_fates()

    def _restored(self, restored: Restoration | None, state: Mapping[str, Any]) -> int:
        step = restored.step if restored else 0
        is_equal = same_bits(state, state_at(step))
        sources = sorted(restored.report.bytes_by_source) if restored else []
        fallbacks = len(restored.report.fallbacks) if restored else 0
        self._say("restored", step, equal=is_equal, sources=sources, fallbacks=fallbacks)
        return step

    def _update(self, state: dict[str, Any], step: int) -> None:
        for name, value in state_at(step).items():
            if isinstance(value, torch.Tensor):
                state[name].copy_(value)
            else:
                state[name] = value

    def _tell_fates(self) -> None:
        for (step, tier), saving in list(self._undecided.items()):
            fate = saving.durable(tier)
            if fate.done():
                del self._undecided[step, tier]
                error = fate.exception()
                self._say("durable" if error is None else "failed", step, tier=tier, why=str(error or ""))
                if error is None:
                    self._reached[tier] = max(self._reached.get(tier, 0), step)
        forgotten = [
            (step, tier)
            for step, tier in self._undecided
            if tier != FAR and step < self._reached.get(tier, 0) - _MAX_BEHIND
        ]
        if forgotten:
            raise AssertionError(f"nothing was ever said of {forgotten}, reached are {self._reached}")

    def _say(self, what: str, step: int, **more: Any) -> None:
        self._diary.write(json.dumps({"what": what, "step": step, **more}) + "\n")


def main(directory: str) -> None:
    """Fork a trainer for each line, which is the number of its life; answer with its process id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for them
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            print(pid, flush=True)  # noqa: T201 -- the answer
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        try:
            Trainer(Path(directory), int(line)).live()
        except BaseException:  # noqa: BLE001 -- the process's border
            traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
