"""The report is arithmetic over the journal: given moments, known figures."""

from pathlib import Path

import pytest

from elastic.control.events import (
    Cause,
    CheckpointCaptured,
    CheckpointDurable,
    Ending,
    Entry,
    FaultStruck,
    MemberEnded,
    MemberLost,
    MemberReady,
    SegmentEnded,
    SegmentStarted,
    Settled,
    StepCommitted,
    WorldBroken,
    WorldFormed,
)
from elastic.control.instructions import End, FormWorld, Instruction, Manner, Status
from elastic.control.report import Moment, build_report
from elastic.errors import RunGone
from elastic.runtime.journal import NAME, Journal, read_moments, read_report


def world(generation: int, *members: str) -> FormWorld:
    return FormWorld(generation, members, ("h",) * len(members), Manner.AT_ONCE, "test")


def step(generation: int, number: int, seconds: float = 1.0) -> StepCommitted:
    return StepCommitted("w0", generation, number, 4.0 - number, seconds, 100, 0.0)


def killed_and_replaced() -> list[tuple[float, Entry | Instruction]]:
    """Two workers, one SIGKILLed in its third step; the survivor goes on alone, a replacement joins."""
    return [
        (0.0, SegmentStarted(5, 0, 1000.0)),
        (10.0, MemberReady("w0", "h", 1)),
        (10.5, MemberReady("w1", "h", 2)),
        (10.5, world(1, "w0", "w1")),
        (10.6, WorldFormed("w0", 1, 0.1)),
        (10.7, Settled("w0", 1, 0, "fresh", 0.1)),
        (10.8, Settled("w1", 1, 0, "peer", 0.1)),
        (12.0, step(1, 1)),
        (13.0, step(1, 2)),
        (13.1, CheckpointCaptured("w0", 1, 2, 0.25)),
        (13.2, FaultStruck("w1", 2)),
        (13.25, WorldBroken("w0", 1, "reset")),
        (13.3, MemberLost("w1", Cause.PROCESS_DIED, "ray")),
        (13.4, world(2, "w0")),
        (13.6, WorldFormed("w0", 2, 0.2)),
        (13.7, Settled("w0", 2, 2, "self", 0.1)),
        (15.0, step(2, 3)),
        (15.5, CheckpointDurable("w0", 2, 2, "store", 100, 1.0)),
        (16.0, world(3, "w0", "w2")),
        (16.2, Settled("w0", 3, 4, "self", 0.1)),
        (16.4, Settled("w2", 3, 4, "peer", 0.1)),
        (16.3, step(2, 4)),
        (17.5, step(3, 5)),
        (20.0, MemberEnded("w0", 3, 5, Ending.FINISHED, "abc")),
        (20.0, End(Status.FINISHED, "done")),
        (20.0, SegmentEnded("finished", "done")),
    ]


def test_a_killed_worker_is_accounted_for_phase_by_phase() -> None:
    report = build_report("r", [Moment(at, entry) for at, entry in killed_and_replaced()])
    (failure,) = report.failures
    assert failure.cause == "process died"
    assert failure.member == "w1"
    assert failure.detect_s == pytest.approx(0.1)
    assert failure.decide_s == pytest.approx(0.1)
    assert failure.form_s == pytest.approx(0.2)
    assert failure.restore_s == pytest.approx(0.1)
    assert failure.total_s == pytest.approx(15.0 - 13.2)
    assert failure.full_strength_s == pytest.approx(16.4 - 13.2)
    assert (failure.redone_steps, failure.dropped_attempts) == (0, 1)
    assert failure.state_source == "peer+self"
    assert report.status == "finished"
    assert report.ettr == pytest.approx(5.0 / 10.0)
    assert [span.size for span in report.worlds] == [2, 1, 2]
    assert report.checkpoints.durable == {"store": 1}
    assert report.checkpoints.blocked_s_max == 0.25
    assert report.weights_sha256 == "abc"
    assert (report.first_loss, report.last_loss) == (3.0, -1.0)


def test_a_run_that_was_killed_as_a_whole_reports_the_steps_it_computes_again() -> None:
    before = killed_and_replaced()[:9]
    after: list[tuple[float, Entry | Instruction]] = [
        (50.0, SegmentStarted(5, 1, 1050.0)),
        (55.0, MemberReady("w1.0", "h", 3)),
        (55.0, world(2, "w1.0")),
        (55.1, WorldFormed("w1.0", 2, 0.1)),
        (55.3, Settled("w1.0", 2, 1, "store", 0.2)),
        (56.5, step(2, 2)),
        (57.5, step(2, 3)),
    ]
    report = build_report("r", [Moment(at, entry) for at, entry in before + after])
    (failure,) = report.failures
    assert failure.cause == "driver lost"
    assert failure.redone_steps == 1
    assert failure.state_source == "store"
    assert failure.full_strength_s is None
    assert report.segments == 2
    assert report.status == "running"
    assert report.computing_s == pytest.approx(3.0), "a step that was computed twice counts once"


def test_the_journal_gives_back_what_was_recorded_and_skips_a_torn_line(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for at, entry in killed_and_replaced():
            journal.record(at, entry)
            journal.record(at, entry)
    with (tmp_path / NAME).open("a") as torn:
        torn.write('{"t": 21.0, "kind": "StepComm')
    with Journal(tmp_path) as journal:
        journal.record(30.0, SegmentStarted(5, 3, 1.0))
    moments = list(read_moments(tmp_path))
    steps = [moment for moment in moments if isinstance(moment.entry, StepCommitted)]
    assert len(steps) == 5
    assert moments[-1] == Moment(30.0, SegmentStarted(5, 3, 1.0))
    assert {type(moment.entry) for moment in moments} == {type(entry) for _, entry in killed_and_replaced()}


def test_a_run_without_a_journal_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunGone, match="never started"):
        read_report(tmp_path)
