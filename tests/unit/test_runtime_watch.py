"""What the driver tells: a run's picture and its journal. Neither an onlooker nor a full disk ends a run."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.control.events import Entry, Settled, StepCommitted
from elastic.control.instructions import FormWorld, Instruction, Manner
from elastic.control.report import Moment
from elastic.runtime.journal import NAME, Journal, read_moments
from elastic.runtime.notices import Happening, LogLine, Notice, Progress
from elastic.runtime.watch import Watch

ORDER: Any = SimpleNamespace(training=SimpleNamespace(num_steps=200))


def committed(generation: int, step: int) -> StepCommitted:
    return StepCommitted("w0", generation, step, 100.0 - step, 0.5, 100, 0.0)


def world(generation: int, manner: Manner = Manner.AT_ONCE) -> FormWorld:
    return FormWorld(generation, ("w0",), ("h",), manner, "test")


def settled(generation: int, step: int) -> Settled:
    return Settled("w0", generation, step, "store", 0.1)


@pytest.fixture
def steps_shown(monkeypatch):
    """Give what shows the steps a person saw, after the run told of some entries."""
    monkeypatch.setattr("elastic.runtime.watch.PROGRESS_EVERY_S", -1.0)

    def show(*entries: Entry | Instruction) -> list[tuple[int, int]]:
        seen: list[Notice] = []
        watch = Watch(ORDER, seen.append)
        for entry in entries:
            watch.see(entry)
        return [(each.generation, each.step) for each in seen if isinstance(each, Progress)]

    return show


def test_progress_goes_on_after_the_run_was_rolled_back(steps_shown):
    shown = steps_shown(
        *(world(1), settled(1, 0), committed(1, 100)),
        *(world(2), settled(2, 80), committed(2, 81), committed(2, 82)),
    )
    assert shown[-4:] == [(2, 100), (2, 80), (2, 81), (2, 82)]


def test_steps_told_again_or_late_do_not_move_the_progress_back(steps_shown):
    shown = steps_shown(
        *(world(1), settled(1, 0), committed(1, 29), committed(1, 30), committed(1, 29)),
        *(world(2), settled(2, 31), committed(1, 31), settled(2, 31), committed(2, 32)),
    )
    assert [step for _, step in shown] == [0, 0, 29, 30, 30, 31, 32]


def test_progress_goes_on_while_a_world_waits_for_its_boundary(steps_shown):
    shown = steps_shown(
        world(1), settled(1, 0), committed(1, 1), world(2, Manner.AT_BOUNDARY), committed(1, 2)
    )
    assert shown[-1] == (2, 2)


def test_what_memories_a_restore_came_from_is_told_once_however_many_members_it_reached():
    seen: list[Notice] = []
    watch = Watch(ORDER, seen.append)
    for member in ("w0", "w1", "w2"):
        watch.see(Settled(member, 2, 80, "store", 0.1, "9 bytes from parity"))
    watch.see(Settled("w0", 3, 80, "self", 0.1))
    assert [each.message for each in seen if isinstance(each, Happening)] == [
        "w0 is at step 80 of world 2, from store (0.10 s). 9 bytes from parity"
    ]


def test_an_observer_that_raises_is_dropped_with_one_line_and_ends_nothing(caplog):
    seen: list[Notice] = []

    def broken_pipe(notice: Notice) -> None:
        seen.append(notice)
        raise BrokenPipeError("nobody reads this any more")

    watch = Watch(ORDER, broken_pipe)
    watch.tell(LogLine("w0", 20, "hello"))
    watch.happen("world", "a new one")
    watch.phase("training")
    watch.see(committed(1, 1))
    assert len(seen) == 1
    (record,) = caplog.records
    assert "nobody reads this any more" in record.getMessage()


def test_an_interrupt_while_an_observer_runs_is_not_swallowed():
    def interrupted(_: Notice) -> None:
        raise KeyboardInterrupt

    watch = Watch(ORDER, interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch.happen("world", "a new one")


class FullDisk(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data)[: self.room]
        self.room -= len(taken)
        return super().write(taken)


def fill(journal: Journal, path: Path, room: int) -> FullDisk:
    journal._file.close()
    journal._file = disk = FullDisk(path, "ab")
    disk.room = room
    return disk


def test_a_full_disk_ends_no_training_and_loses_no_moment(tmp_path: Path, caplog) -> None:
    told = [Moment(float(number), committed(1, number)) for number in range(1, 21)]
    with Journal(tmp_path) as journal:
        disk = fill(journal, tmp_path / NAME, room=400)
        for moment in told[:-2]:
            journal.record(moment.at_s, moment.entry)
        assert 0 < len(list(read_moments(tmp_path))) < 10
        disk.room = 1_000_000
        for moment in told[-2:]:
            journal.record(moment.at_s, moment.entry)
    assert list(read_moments(tmp_path)) == told
    assert len(caplog.records) == 1


def test_what_a_full_disk_keeps_in_memory_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("elastic.runtime.journal.MAX_UNWRITTEN", 3)
    with Journal(tmp_path) as journal:
        disk = fill(journal, tmp_path / NAME, room=0)
        for number in range(1, 11):
            journal.record(float(number), committed(1, number))
        disk.room = 1_000_000
    assert [moment.at_s for moment in read_moments(tmp_path)] == [8.0, 9.0, 10.0]


def test_a_disk_that_stays_full_costs_the_rest_of_the_journal_and_says_so(tmp_path: Path, caplog) -> None:
    with Journal(tmp_path) as journal:
        fill(journal, tmp_path / NAME, room=0)
        journal.record(1.0, committed(1, 1))
    assert "lacks its last 1 moments" in caplog.records[-1].getMessage()
