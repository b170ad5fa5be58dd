"""The report is arithmetic over the journal: given moments, known figures."""

from dataclasses import replace
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
from elastic.control.instructions import End, FormWorld, Instruction, KillMember, Manner, Status
from elastic.control.report import Moment, TrainReport, build_report
from elastic.errors import RunGone
from elastic.runtime.journal import NAME, Journal, read_moments, read_report

Told = list[tuple[float, Entry | Instruction]]


def world(generation: int, *members: str) -> FormWorld:
    return FormWorld(generation, members, ("h",) * len(members), Manner.AT_ONCE, "test")


def step(generation: int, number: int, seconds: float = 1.0) -> StepCommitted:
    return StepCommitted("w0", generation, number, 4.0 - number, seconds, 100, 0.0)


def killed_and_replaced() -> Told:
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
        (16.0, FormWorld(3, ("w0", "w2"), ("h", "h"), Manner.AT_BOUNDARY, "a joiner")),
        (16.2, Settled("w0", 3, 4, "self", 0.1)),
        (16.4, Settled("w2", 3, 4, "peer", 0.1)),
        (16.3, step(2, 4)),
        (17.5, step(3, 5)),
        (20.0, MemberEnded("w0", 3, 5, Ending.FINISHED, "abc")),
        (20.0, End(Status.FINISHED, "done")),
        (20.0, SegmentEnded("finished", "done")),
    ]


def steps(generation: int, first: int, last: int, at: float) -> Told:
    """Steps `first` to `last`, one a second from `at` on."""
    return [(at + number - first, step(generation, number)) for number in range(first, last + 1)]


def formed(generation: int, start: int, source: str, at: float, *members: str) -> Told:
    """A world ordered at `at`, formed 0.1 s and settled 0.2 s later, at the committed step `start`."""
    return [
        (at, world(generation, *members)),
        *((at + 0.1, WorldFormed(member, generation, 0.1)) for member in members),
        *((at + 0.2, Settled(member, generation, start, source, 0.1)) for member in members),
    ]


def lost(at: float, member: str) -> tuple[float, Entry]:
    return at, MemberLost(member, Cause.PROCESS_DIED, "ray")


def two_workers(last: int) -> Told:
    """Two workers, from second 0 on; step n is committed in second n."""
    return [
        (0.0, SegmentStarted(200, 0, 1000.0)),
        (0.0, MemberReady("w0", "h", 1)),
        (0.0, MemberReady("w1", "h", 2)),
        *formed(1, 0, "fresh", 0.1, "w0", "w1"),
        *steps(1, 1, last, 1.0),
    ]


def report_of(*parts: Told) -> TrainReport:
    return build_report("r", [Moment(at, entry) for part in parts for at, entry in part])


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
    after: Told = [
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


def test_a_failure_after_a_rollback_is_measured_from_where_the_run_stood_then() -> None:
    report = report_of(
        two_workers(100),
        [lost(100.5, "w0"), lost(100.6, "w1")],
        formed(2, 80, "store", 101.0, "w2", "w3"),
        steps(2, 81, 85, 102.0),
        [lost(106.5, "w3")],
        formed(3, 85, "self", 107.0, "w2"),
        steps(3, 86, 101, 108.0),
    )
    assert report.redone_steps == 20
    assert [failure.step for failure in report.failures] == [100, 100, 85]
    assert [failure.redone_steps for failure in report.failures] == [0, 20, 0]


def test_a_step_told_late_does_not_move_the_run_back() -> None:
    late = (32.0, step(1, 31))  # committed by a survivor while it settled in world 2
    report = report_of(
        two_workers(30),
        [lost(30.5, "w1")],
        formed(2, 31, "self", 31.0, "w0"),
        [late],
        steps(2, 32, 33, 33.0),
        [lost(34.5, "w0")],
        formed(3, 33, "store", 35.0, "w2"),
    )
    first, second = report.failures
    assert (first.step, first.dropped_attempts, second.step) == (30, 0, 33)
    assert report.redone_steps == 0


def test_steps_that_are_done_twice_without_a_failure_are_counted_all_the_same() -> None:
    report = report_of(
        two_workers(50),
        [
            (50.5, End(Status.FAILED, "the job's own code failed")),
            (50.5, SegmentEnded("failed", "it raised")),
        ],
        [(60.0, SegmentStarted(200, 1, 1060.0)), (61.0, MemberReady("w1.0", "h", 3))],
        formed(2, 40, "store", 62.0, "w1.0"),
        steps(2, 41, 60, 63.0),
    )
    assert report.failures == ()
    assert report.redone_steps == 10


def test_a_step_told_again_by_another_rank_or_to_another_driver_is_not_redone() -> None:
    assert report_of(two_workers(5), steps(1, 4, 5, 6.0)).redone_steps == 0


def test_two_losses_before_one_new_world_share_one_redo_and_one_dropped_attempt() -> None:
    report = report_of(
        two_workers(10),
        [lost(10.5, "w0"), lost(10.6, "w1")],
        formed(2, 8, "store", 20.0, "w2", "w3"),
        steps(2, 9, 12, 21.0),
    )
    assert [failure.redone_steps for failure in report.failures] == [0, 2]
    assert [failure.dropped_attempts for failure in report.failures] == [0, 1]
    assert (report.redone_steps, report.dropped_attempts) == (2, 1)
    assert all(failure.total_s is not None for failure in report.failures)


def test_a_world_that_not_all_ranks_settled_in_has_no_restore_time() -> None:
    report = report_of(
        two_workers(10),
        [lost(10.5, "w1"), (10.6, world(2, "w0", "w2")), (10.7, Settled("w0", 2, 10, "self", 0.1))],
        [(10.8, WorldFormed("w2", 2, 0.1)), lost(10.9, "w2")],
        formed(3, 10, "self", 11.0, "w0"),
        steps(3, 11, 12, 12.0),
    )
    first, second = report.failures
    assert first.restore_s is None
    assert first.full_strength_s is None
    assert second.restore_s == pytest.approx(0.1)


def test_a_world_that_never_settled_passes_its_dropped_attempt_on() -> None:
    report = report_of(
        two_workers(10),
        [lost(10.5, "w1"), (10.6, world(2, "w0", "w2")), lost(10.9, "w2")],
        formed(3, 10, "self", 11.0, "w0"),
        steps(3, 11, 12, 12.0),
    )
    assert [failure.dropped_attempts for failure in report.failures] == [0, 1]


def test_a_loss_after_the_last_step_drops_no_attempt() -> None:
    report = report_of(two_workers(200), [lost(200.5, "w1")], formed(2, 200, "self", 201.0, "w0"))
    assert (len(report.failures), report.dropped_attempts) == (1, 0)


def test_a_loss_before_the_first_step_was_begun_drops_no_attempt() -> None:
    report = report_of(
        [(0.0, SegmentStarted(5, 0, 1000.0)), (0.0, MemberReady("w0", "h", 1)), (0.1, world(1, "w0", "w1"))],
        [lost(0.2, "w1")],
        formed(2, 0, "fresh", 0.3, "w0"),
        steps(2, 1, 5, 1.0),
    )
    assert (len(report.failures), report.dropped_attempts) == (1, 0)


def test_a_loss_between_the_last_boundary_and_the_next_world_drops_no_attempt() -> None:
    boundary = FormWorld(2, ("w0", "w1", "w2"), ("h",) * 3, Manner.AT_BOUNDARY, "a joiner")
    report = report_of(
        two_workers(3),
        [(3.5, boundary), (4.0, step(1, 4)), (4.1, MemberEnded("w0", 1, 4, Ending.REGROUP)), lost(4.2, "w2")],
        formed(3, 4, "self", 4.5, "w0", "w1"),
        steps(3, 5, 6, 5.0),
    )
    (failure,) = report.failures
    assert (failure.member, failure.dropped_attempts) == ("w2", 0)


def test_a_loss_in_a_world_that_only_saves_drops_no_attempt_of_its_own() -> None:
    saves = FormWorld(2, ("w0", "w2"), ("h", "h"), Manner.AT_ONCE, "last", only_saves=True)
    settled: Told = [(11.0, Settled(member, 2, 10, "self", 0.1)) for member in ("w0", "w2")]
    report = report_of(
        two_workers(10),
        [lost(10.5, "w1"), (10.6, saves), *settled, lost(11.5, "w2")],
        [(11.6, replace(saves, generation=3, members=("w0",)))],
        [(12.0, Settled("w0", 3, 10, "self", 0.1)), (13.0, MemberEnded("w0", 3, 10, Ending.STOPPED))],
        [(13.1, End(Status.FAILED, "too many")), (13.1, SegmentEnded("failed", "too many"))],
    )
    first, second = report.failures
    assert (first.dropped_attempts, second.dropped_attempts) == (1, 0)
    assert (first.redone_steps, second.redone_steps, second.total_s) == (0, 0, None)
    assert report.committed_steps == 10


def test_times_run_on_when_the_clock_restarts_with_the_machine() -> None:
    later: Told = [
        (7.0, SegmentStarted(200, 1, 1000.0 + 60.0)),
        (9.0, MemberReady("w1.0", "h", 3)),
        *formed(2, 8, "store", 10.0, "w1.0", "w1.1"),
        *steps(2, 9, 10, 11.0),
    ]
    report = report_of(two_workers(10), later)
    (failure,) = report.failures
    assert failure.cause == "driver lost"
    assert failure.detect_s == pytest.approx(50.0)
    assert failure.decide_s == pytest.approx(3.0)
    assert failure.total_s == pytest.approx(54.0)
    assert report.wall_s == pytest.approx(65.0)
    assert report.worlds[1].at_s == pytest.approx(63.0)


def test_a_machine_whose_wall_clock_is_behind_makes_no_negative_durations() -> None:
    later: Told = [(0.5, SegmentStarted(200, 1, 900.0)), *formed(2, 10, "store", 1.0, "w1.0")]
    report = report_of(two_workers(10), later, steps(2, 11, 12, 2.0))
    (failure,) = report.failures
    assert failure.detect_s == 0.0
    assert failure.total_s == pytest.approx(1.5)
    assert report.wall_s == pytest.approx(12.5)


def test_a_world_broken_without_a_loss_is_a_failure_of_its_own() -> None:
    report = report_of(
        two_workers(10),
        [(10.5, WorldBroken("w1", 1, "reset")), (10.6, WorldBroken("w0", 1, "reset"))],
        formed(2, 10, "self", 11.5, "w0", "w1"),
        [(11.8, WorldBroken("w0", 1, "stale"))],
        steps(2, 11, 12, 12.0),
    )
    (failure,) = report.failures
    assert (failure.cause, failure.member, failure.step) == ("world broken", "world 1", 10)
    assert failure.detect_s == pytest.approx(1.0)
    assert failure.decide_s == 0.0
    assert failure.total_s == pytest.approx(1.5)
    assert (report.redone_steps, report.dropped_attempts) == (0, 1)


@pytest.mark.parametrize("cause", [Cause.HUNG, Cause.FAILED])
def test_a_worker_that_was_killed_is_a_failure_of_the_cause_it_was_killed_for(cause: Cause) -> None:
    report = report_of(
        two_workers(10),
        [(40.0, KillMember("w1", "silent", cause))],
        formed(2, 10, "self", 40.0, "w0"),
        steps(2, 11, 12, 41.0),
    )
    (failure,) = report.failures
    assert (failure.cause, failure.member, failure.dropped_attempts) == (cause, "w1", 1)


def test_a_failure_that_ended_the_run_has_no_recovery_in_the_resumed_one() -> None:
    report = report_of(
        two_workers(10),
        [
            lost(10.5, "w0"),
            (10.5, End(Status.FAILED, "too many")),
            (10.5, SegmentEnded("failed", "too many")),
        ],
        [(5000.0, SegmentStarted(200, 1, 6000.0))],
        formed(2, 8, "store", 5001.0, "w1.0"),
        steps(2, 9, 11, 5002.0),
    )
    (failure,) = report.failures
    assert (failure.decide_s, failure.total_s, failure.redone_steps) == (None, None, 0)
    assert report.redone_steps == 2


def test_a_snapshot_is_captured_when_every_rank_of_its_world_has_it() -> None:
    report = report_of(
        two_workers(10),
        [(2.5, CheckpointCaptured("w0", 1, 2, 0.1)), (2.6, CheckpointCaptured("w1", 1, 2, 0.3))],
        [(4.5, CheckpointCaptured("w0", 1, 4, 0.2)), (4.6, CheckpointCaptured("w0", 1, 4, 0.2))],
    )
    assert report.checkpoints.captured == 1
    assert report.checkpoints.blocked_s_max == 0.3


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
