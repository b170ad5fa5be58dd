"""SIGKILL at every phase of a step, a join, a forming and a restore; of keeper, driver, raylet, of all."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

import elastic
from tests.fault.elastic_churn import Story
from tests.fault.elastic_job import Doom, Settings
from tests.fault.elastic_orders import sized, tiny_order
from tests.integration.drivers import Drive, driving, finish, kill_group, kill_ray

ENDLESS = 1_000_000


@dataclass(frozen=True)
class Layout:
    """How the state lies on the workers."""

    workers: int = 3
    optimizer_copies: int = 0
    parameter_copies: int = 0
    standbys: int = 2


REPLICATED = Layout()
# Two workers die in some rows before the state has its copies again.
LAYOUTS = {
    "replicas": REPLICATED,
    "sharded optimizer": Layout(workers=4, optimizer_copies=3),
    "sharded parameters": Layout(workers=6, parameter_copies=3),
}
# Each row strikes at once: the first death makes the others' phases come.
IN_A_STEP = {
    "in forward": [Doom("forward", "Tiny.forward")],
    "in backward": [Doom("backward", "in_backward")],
    "inside the reduction": [Doom("exchange", "World.exchange")],
    "as the reduced slices are gathered": [Doom("gather", "World.all_gather")],
    "before the agreement": [Doom("agreement", "agree")],
    "between agreement and step": [Doom("agreed", "Trainer._commit")],
    "after the optimizer's step": [Doom("applied", "Learner.update", "return")],
    "during capture": [Doom("capture", "Snapshots.save", "return")],
    "as replicas are compared": [Doom("compare", "everyones")],
}
AFTER_A_DEATH = {
    "during forming": [Doom("a1", "Tiny.forward"), Doom("forming", "Former._connect")],
    "while meeting": [Doom("a2", "World.exchange"), Doom("meeting", "Former._meet", "return")],
    "as the state settles": [Doom("a3", "Trainer._commit"), Doom("settling", "Trainer.settle")],
    "while a newcomer receives": [Doom("a4", "Tiny.forward"), Doom("join", "accept", newcomer=True)],
    "while a newcomer is sent to": [Doom("a5", "Tiny.forward"), Doom("handing", "hand_over")],
    "twice in a row": [Doom("a6", "Tiny.forward"), Doom("again", "in_backward")],
}
RESTORE = Doom("restore", "_restorer.<locals>.restore", newcomer=True)
FEW = ("in backward", "inside the reduction", "between agreement and step", "while a newcomer is sent to")


# As many may die before the state has its copies again as there are copies, less one.
FEW_OF_SHARDS = {
    "sharded optimizer": (
        Layout(workers=4, optimizer_copies=3),
        ("after the optimizer's step", "during forming", "while a newcomer is sent to"),
    ),
    "sharded parameters": (
        Layout(workers=4, parameter_copies=2),
        ("in backward", "inside the reduction", "during capture"),
    ),
}


class Victims:
    """A run with standbys, whose phases are made deadly one after the other."""

    def __init__(
        self, directory: Path, drive: Drive, rows: dict[str, list[Doom]], layout: Layout = REPLICATED
    ) -> None:
        self.marks = directory / "marks"
        self.marks.mkdir()
        dooms = tuple(doom for row in rows.values() for doom in row)
        settings = Settings(pause_s=0.005, marks=str(self.marks), dooms=(*dooms, RESTORE))
        order = tiny_order(directory, "doomed", settings, num_steps=ENDLESS)
        training = replace(
            order.training, optimizer_copies=layout.optimizer_copies, parameter_copies=layout.parameter_copies
        )
        order = replace(order, training=training, checkpoint=replace(order.checkpoint, every_steps=10))
        self.order, self._layout = sized(order, layout.workers, standbys=layout.standbys), layout
        self.story = Story(self.order.run_dir)
        self._drive = drive
        self.driver = drive(self.order)

    def redrive(self) -> None:
        """Start a successor of the driver."""
        self.driver = self._drive(self.order)

    def until(self, what: str, is_so: Callable[[], bool], seconds: float = 200.0) -> None:
        """Wait until something is so in the story."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"waited in vain: {what}; {self.order.run_dir}"
            assert self.driver.poll() is None, f"the driver ended: {what}; {self.order.run_dir}"
            time.sleep(0.05)
            self.story.update()

    def is_whole(self) -> bool:
        """Whether a full world trains, with a standby beside it if it has some."""
        idle = self.story.pids.keys() - self.story.gone - self.story.holders
        living = self.story.holders - self.story.gone
        is_full = len(living) == self._layout.workers and len(idle) >= min(1, self._layout.standbys)
        return is_full and self.story.newest_settled

    def meet(self, name: str, row: list[Doom]) -> None:
        """Let a phase be deadly, and wait until the run has got over it."""
        self.until(f"a full world before {name}", self.is_whole)
        for doom in row:
            doom.arm(self.marks)
        self.until(name, lambda: all(doom.has_struck(self.marks) for doom in row))
        step = self.story.steps
        self.until(f"steps after {name}", lambda: self.story.steps > step + 2)

    def end(self) -> elastic.TrainReport:
        """Stop the run in good order; return its report."""
        step = self.story.steps
        self.until("a step at the end", lambda: self.story.steps > step + 2)
        self.driver.terminate()
        self.driver.wait(timeout=60)
        return elastic.read_report(self.order.run_dir)


def keepers(order: elastic.TrainOrder) -> list[psutil.Process]:
    """Find the run's keepers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "checkpoint.keeper" in command and any(str(order.run_dir) in part for part in command):
            found.append(process)
    return found


def kill_keeper(victims: Victims) -> None:
    """SIGKILL the host's keeper; training goes on."""
    victims.until("a keeper", lambda: bool(keepers(victims.order)))
    for process in keepers(victims.order):
        process.kill()
    step = victims.story.steps
    victims.until("steps after the keeper's death", lambda: victims.story.steps > step + 12)


def kill_driver(victims: Victims) -> None:
    """SIGKILL the driver; its successor finds the workers, and none is started for the world."""
    victims.until("a full world before the driver dies", victims.is_whole)
    kill_group(victims.driver)
    step = victims.story.steps
    victims.redrive()
    victims.until("steps under the new driver", lambda: victims.story.steps > step + 10)


def kill_raylet(victims: Victims) -> None:
    """SIGKILL the raylet of the driver's host, and with it all workers; the driver starts a Ray anew."""
    victims.until("a full world before the raylet dies", victims.is_whole)
    warden = psutil.Process(int((victims.order.run_dir / "ray" / "pid").read_text()))
    (raylet,) = (one for one in warden.children(recursive=True) if one.name() == "raylet")
    lost = set(victims.story.pids)
    raylet.kill()
    victims.until("all are lost", lambda: lost <= victims.story.gone)
    victims.until("a full world after the raylet died", victims.is_whole, seconds=120)


def raze(victims: Victims) -> None:
    """SIGKILL everything there is; then the first process that restores, too."""
    kill_group(victims.driver)
    kill_ray(victims.order)
    for process in keepers(victims.order):
        process.kill()
    RESTORE.arm(victims.marks)
    victims.redrive()
    newest = elastic.read_report(victims.order.run_dir).segments
    victims.until("the restoring process died", lambda: RESTORE.has_struck(victims.marks))
    victims.until("a world after it", lambda: victims.story.num_segments > newest - 1 and victims.is_whole())


def assert_nobody_can_tell(directory: Path, report: elastic.TrainReport) -> None:
    """Compare with a run that nothing happened to."""
    assert report.status == "stopped", report.reason
    quiet = tiny_order(directory, "quiet", Settings(), num_steps=report.committed_steps)
    undisturbed = finish(sized(quiet, 1))
    assert undisturbed.weights_sha256 == report.weights_sha256
    assert undisturbed.last_loss == report.last_loss


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kill_in_a_step_or_a_join_or_of_the_keeper_or_the_driver_changes_no_bit(tmp_path: Path) -> None:
    rows = {name: row for name, row in {**IN_A_STEP, **AFTER_A_DEATH}.items() if name in FEW}
    with driving(tmp_path) as drive:
        victims = Victims(tmp_path, drive, rows)
        for name, row in rows.items():
            victims.meet(name, row)
        kill_keeper(victims)
        kill_driver(victims)
        report = victims.end()
    assert report.redone_steps == 0
    assert_nobody_can_tell(tmp_path, report)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_the_raylet_of_the_drivers_host_was_killed_the_driver_goes_on_with_the_same_bits(
    tmp_path: Path,
) -> None:
    with driving(tmp_path) as drive:
        victims = Victims(tmp_path, drive, {}, Layout(workers=2, standbys=0))
        victims.until("steps", lambda: victims.story.steps > 25, seconds=120)
        kill_raylet(victims)
        report = victims.end()
    assert_nobody_can_tell(tmp_path, report)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FEW_OF_SHARDS)
def test_a_kill_among_shards_loses_no_step_and_changes_no_bit(tmp_path: Path, name: str) -> None:
    layout, few = FEW_OF_SHARDS[name]
    rows = {phase: row for phase, row in {**IN_A_STEP, **AFTER_A_DEATH}.items() if phase in few}
    with driving(tmp_path) as drive:
        victims = Victims(tmp_path, drive, rows, layout)
        for phase, row in rows.items():
            victims.meet(phase, row)
        report = victims.end()
    assert report.redone_steps == 0
    assert_nobody_can_tell(tmp_path, report)


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kill_at_any_phase_whatever_changes_no_bit(tmp_path: Path, layout: str) -> None:
    rows = {**IN_A_STEP, **AFTER_A_DEATH}
    with driving(tmp_path) as drive:
        victims = Victims(tmp_path, drive, rows, LAYOUTS[layout])
        for name, row in rows.items():
            victims.meet(name, row)
        kill_keeper(victims)
        kill_driver(victims)
        redone = elastic.read_report(victims.order.run_dir).redone_steps
        raze(victims)
        report = victims.end()
    assert redone == 0
    assert_nobody_can_tell(tmp_path, report)
