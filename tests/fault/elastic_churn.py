"""Churn after PCCL's schedule: members come and go at random, by SIGKILL, SIGSTOP, or because they are not
wanted any more.
"""

import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import elastic

FEWEST, MOST = 2, 10
SPAWN = 0.6
PAUSE_S = (0.5, 2.0)
PATIENCE_S = 90.0


@dataclass
class Story:
    """What a run's journal tells of its members, read as it grows."""

    run_dir: Path
    pids: dict[str, int] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    holders: set[str] = field(default_factory=set)
    steps: int = 0
    newest_settled: bool = False
    num_segments: int = 0
    has_ended: bool = False
    last: str = ""
    moments: list[dict[str, Any]] = field(default_factory=list)
    _settled: dict[int, set[str]] = field(default_factory=dict)
    _orders: dict[int, set[str]] = field(default_factory=dict)
    _read: int = 0

    def update(self) -> None:
        """Take in what is new."""
        path = self.run_dir / "journal.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                if line.strip():
                    self._take(json.loads(line))

    def _take(self, moment: dict[str, Any]) -> None:
        self.moments.append(moment)
        match moment["kind"]:
            case "MemberReady":
                self.pids[moment["member"]] = moment["pid"]
                self.hosts[moment["member"]] = moment["host"]
            case "MemberLost" | "KillMember" | "ReleaseMember":
                self.gone.add(moment["member"])
            case "SegmentStarted":
                self.num_segments += 1
                self.has_ended = False
            case "SegmentEnded":
                self.has_ended = True
            case "FormWorld":
                self.newest_settled = False
                self._orders[moment["generation"]] = set(moment["members"])
                self.last = moment["members"][-1]
            case "Settled":
                settled = self._settled.setdefault(moment["generation"], set())
                settled.add(moment["member"])
                if settled == self._orders[moment["generation"]]:
                    self.holders = set(settled)
                    self.newest_settled = moment["generation"] == max(self._orders)
            case "StepCommitted":
                self.steps = max(self.steps, moment["step"])
            case _:
                pass


@dataclass
class Churn:
    """Lets members come and go; `struck` tells who was killed how."""

    run_dir: Path
    seed: int
    story: Story = field(init=False)
    struck: dict[str, str] = field(default_factory=dict)
    num_spawned: int = 0
    _wanted: int = FEWEST

    def __post_init__(self) -> None:
        self.story = Story(self.run_dir)
        self._random = random.Random(self.seed)

    def play(self, seconds: float, at_least: int) -> None:
        """Let members come and go for a while, from the first committed step on; longer on a machine so slow
        that not as many were struck by then.
        """
        deadline = time.monotonic() + 120.0
        while self.story.steps == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            self.story.update()
        assert self.story.steps, "the run did not begin"
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until or (len(self.struck) < at_least and now < until + PATIENCE_S):
            time.sleep(self._random.uniform(*PAUSE_S))
            self.story.update()
            if self._random.random() < SPAWN and self._wanted < MOST:
                self.num_spawned += 1
                self._want(self._wanted + 1)
            else:
                self._strike()

    def _strike(self) -> None:
        """Kill or stop one member, unless fewer than two would be left that hold the state."""
        gone = self.story.gone | self.struck.keys()
        alive = sorted(self.story.pids.keys() - gone)
        holders = self.story.holders - gone
        victim = self._random.choice(alive)
        if len(holders - {victim}) < FEWEST or self._wanted <= FEWEST:
            return
        is_first = self._random.random() < 0.5  # it shrinks because it is asked to, or because it must
        if is_first:
            self._want(self._wanted - 1)
        number = self._random.choice((signal.SIGKILL, signal.SIGSTOP))
        self.struck[victim] = number.name
        try:
            os.kill(self.story.pids[victim], number)
        except ProcessLookupError:
            self.struck[victim] = "gone before"
        if not is_first:
            self._want(self._wanted - 1)

    def _want(self, workers: int) -> None:
        self._wanted = workers
        elastic.resize(self.run_dir, workers)
