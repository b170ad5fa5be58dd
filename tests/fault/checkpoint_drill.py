"""A drill: trainer and keeper are killed at random moments of a run that saves every step, again and again.

After each kill it is checked that nothing is lost that was said to be safe: `Broken` tells what was.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import Catalog, Store, load, open_store, verify
from tests.fault.checkpoint_nursery import EVERY, FAR, NUM_KEPT, state_at
from tests.fault.checkpoint_worlds import same_bits

VICTIMS = ("trainer", "trainer", "keeper", "keeper", "both")
_PATIENCE_S = 60.0


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass(slots=True)
class Findings:
    """What a drill saw: whom it killed, where the next trainer had its state from, and what that cost.

    `most_redone` tells by victim how many captured steps were lost at most. `num_flushed` times a keeper made
    durable what a dead trainer had captured.
    """

    seeds: list[int] = field(default_factory=list)
    killed: dict[str, int] = field(default_factory=dict)
    restored_from: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    most_redone: dict[str, int] = field(default_factory=dict)
    num_flushed: int = 0
    last_step: int = 0


class Diaries:
    """What the trainers of a run said, life by life. A line that was cut short by a death is left out."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._life = self._offset = 0
        self.entries: list[Mapping[str, Any]] = []
        self.num_before = 0  # entries of earlier lives

    def turn_page(self) -> int:
        """Begin to read the next life's diary; return its number."""
        self.read()
        self._life, self._offset, self.num_before = self._life + 1, 0, len(self.entries)
        return self._life

    def read(self) -> None:
        """Read on."""
        path = self._root / f"diary{self._life}"
        if path.exists():
            with open(path, "rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
            self._offset += len(whole) + bool(whole)
            self.entries += [json.loads(line) for line in whole.splitlines()]

    def steps(self, what: str, tier: str | None = None, *, since: int = 0) -> list[int]:
        """List the steps of which something was said, in all lives or from an entry on."""
        told = self.entries[since:]
        return [one["step"] for one in told if one["what"] == what and one.get("tier") == tier]


class Drill:
    """One run and who disturbs it."""

    def __init__(self, root: Path) -> None:
        self.findings = Findings()
        self._root = root
        self._stores = {"store": open_store(str(root / "store")), FAR: open_store(str(root / "far"))}
        self._log = open(root / "trainers.log", "wb")  # noqa: SIM115 -- as long as the drill
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.checkpoint_nursery", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._diaries = Diaries(root)
        self._trainer = 0
        self._in_memory = 0  # the newest step that the living keeper is known to hold
        self._last_victim = ""

    def kill(self, seed: int) -> None:
        """Let the run go on for a while, kill somebody, and see to it that nothing is lost."""
        chance = random.Random(seed)
        victim, num_steps = chance.choice(VICTIMS), chance.choice((0, 1, 2, 5, 9))
        self._let_live()
        goal = self._newest_now("captured") + num_steps
        self._await(lambda: num_steps == 0 or self._newest_now("captured") >= goal, "capture another step")
        time.sleep(chance.random() * 0.05)  # any moment will do: this is churn
        if victim != "trainer":
            self._kill_keeper()
        if victim != "keeper":
            self._kill_trainer()
        self.findings.seeds.append(seed)
        _count(self.findings.killed, victim)
        self._last_victim = victim
        self._assert_nothing_acknowledged_is_lost()
        match victim:
            case "keeper":
                reached = self._newest_now("captured") + 1
                self._await(
                    lambda: self._newest_now("durable", "store") > reached, "save after its keeper died"
                )
            case "trainer":
                self._assert_captured_becomes_durable()
        self._assert_newest_is_what_it_claims()

    def end(self) -> None:
        """End everything."""
        self._diaries.read()
        self.findings.last_step = self._newest("captured")
        for one in self._diaries.entries:
            _count(self.findings.told, f"{one['what']} {one.get('tier', '')}".strip())
        if _is_alive(self._trainer):
            os.kill(self._trainer, signal.SIGKILL)
        self._nursery.kill()
        self._nursery.communicate()
        self._kill_keeper()
        self._log.close()

    def assert_sound(self) -> None:
        """Read back all that both tiers have."""
        for name, store in self._stores.items():
            report = verify(store)
            if not report.is_sound:
                raise Broken(f"{name}: {report.bad[:5]}")

    def _let_live(self) -> None:
        """Start a trainer if there is none, and see what it restored."""
        if _is_alive(self._trainer):
            return
        before, life = self._newest_now("captured"), self._diaries.turn_page()
        safe = max([self._in_memory, self._newest("durable", "store")])
        assert self._nursery.stdin and self._nursery.stdout
        self._nursery.stdin.write(f"{life}\n")
        self._nursery.stdin.flush()
        self._trainer = int(self._nursery.stdout.readline())
        self._await(lambda: len(self._diaries.entries) > self._diaries.num_before, "restore")
        restored = self._diaries.entries[self._diaries.num_before]
        if not restored["equal"] or restored["fallbacks"]:
            raise Broken(f"what was restored is not whole, or not the state of its step: {restored}")
        if restored["step"] < safe:
            raise Broken(f"step {safe} was safe when a {self._last_victim} was killed: {restored}")
        _count(self.findings.restored_from, "+".join(restored["sources"]) or "nothing")
        if before:
            most = self.findings.most_redone.get(self._last_victim, 0)
            self.findings.most_redone[self._last_victim] = max(most, before - restored["step"])

    def _kill_trainer(self) -> None:
        os.kill(self._trainer, signal.SIGKILL)
        _await(lambda: not _is_alive(self._trainer), "the trainer did not die")
        self._diaries.read()

    def _kill_keeper(self) -> None:
        pid = self._keeper()
        if pid:
            os.kill(pid, signal.SIGKILL)
            _await(lambda: self._keeper() != pid, "the keeper did not die")
        self._in_memory = 0

    def _keeper(self) -> int:
        """Return the keeper's process id, 0 if there is none just now."""
        with suppress(OSError, ValueError):
            pid = int((self._root / "keeper" / "life.lock").read_text())
            if b"checkpoint.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        return 0

    def _assert_nothing_acknowledged_is_lost(self) -> None:
        """Prove that both tiers have what they were said to have, but for what their policy let expire."""
        self._diaries.read()
        for tier, store in self._stores.items():
            # A listing while others commit and prune is no picture of one moment: a loss is one that lasts.
            _await(partial(self._has_all, tier, store), f"what was durable on {tier} is lost")

    def _has_all(self, tier: str, store: Store) -> bool:
        told, there = set(self._diaries.steps("durable", tier)), set(Catalog(store).steps())
        return told & set(sorted(told | there)[-NUM_KEPT:]) <= there

    def _assert_captured_becomes_durable(self) -> None:
        """Prove that the keeper of a dead trainer goes on alone; what it holds is to be restored."""
        self._in_memory = max(self._in_memory, self._newest_now("captured"))
        wanted, catalog = self._in_memory // EVERY * EVERY, Catalog(self._stores["store"])
        if wanted and (catalog.latest() or 0) < wanted:
            _await(lambda: (catalog.latest() or 0) >= wanted, f"step {wanted} was captured, and is lost")
            self.findings.num_flushed += 1

    def _assert_newest_is_what_it_claims(self) -> None:
        for store in self._stores.values():
            if Catalog(store).steps():
                loaded = load(store)
                if loaded.report.fallbacks or not same_bits(loaded.state, state_at(loaded.manifest.step)):
                    raise Broken(f"{store}: step {loaded.manifest.step} is not what it claims to be")

    def _newest(self, what: str, tier: str | None = None) -> int:
        return max(self._diaries.steps(what, tier), default=0)

    def _newest_now(self, what: str, tier: str | None = None) -> int:
        """Return the newest step of which the trainer that lives now, or lived last, said something."""
        return max(self._diaries.steps(what, tier, since=self._diaries.num_before), default=0)

    def _await(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for the trainer to do something."""

        def is_read() -> bool:
            self._diaries.read()
            if not _is_alive(self._trainer):
                self._diaries.read()
                log = (self._root / "trainers.log").read_text(errors="replace")[-3000:]
                raise Broken(f"the trainer ended by itself instead of going on to {what}: {log}")
            return is_so()

        _await(is_read, f"the trainer did not {what}")


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _is_alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _await(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise Broken(otherwise)
        time.sleep(0.01)
