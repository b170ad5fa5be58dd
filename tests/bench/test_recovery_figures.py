"""The recovery figures say what happened: logs and journals that are known are read as they should be."""

import json
from math import inf
from pathlib import Path

from tests.bench.figures.restarts import read_restart
from tests.bench.figures.runs import Recovery, measured
from tests.bench.peers.default_job import Course, read_course
from tests.fault.elastic_churn import Story


def test_a_peers_restart_counts_the_steps_of_its_next_life_not_those_that_survivors_note_late(tmp_path):
    course = Course(tmp_path, num_steps=7, every=3, kill_step=5)
    told = [
        (1.0, 0, 4, "step"),
        (2.0, 0, 5, "step"),
        (2.1, 0, 5, "kill"),
        (2.2, 0, 5, "step"),
        (8.1, 1, 4, "step"),
        (8.5, 1, 5, "step"),
        (9.1, 1, 6, "step"),
    ]
    lines = [{"time": t, "life": life, "step": step, "rank": 0, "what": what} for t, life, step, what in told]
    course.log.write_text("\n".join(map(json.dumps, lines)))
    restart = read_restart(course)
    assert (restart.next_step_s, restart.new_progress_s, restart.redone_steps) == (6.0, 7.0, 2)
    assert read_course(course.written()) == course


def test_a_recovery_is_measured_from_the_blow_and_a_survivor_knows_when_it_first_says_so(tmp_path: Path):
    def world(t: float, generation: int, *members: str) -> dict[str, object]:
        order = {"t": t, "kind": "FormWorld", "generation": generation, "members": list(members)}
        return order | {"hosts": ["h"] * len(members), "manner": "at once", "reason": ""}

    def of(t: float, kind: str, member: str, generation: int, **more: object) -> dict[str, object]:
        return {"t": t, "kind": kind, "member": member, "generation": generation, **more}

    def step(t: float, generation: int, number: int) -> dict[str, object]:
        more = {"step": number, "loss": 1.0, "seconds": 0.5, "tokens": 1, "blocked_s": 0.0}
        return of(t, "StepCommitted", "a", generation, **more)

    moments = [
        {"t": 0.0, "kind": "SegmentStarted", "num_steps": 9, "generation": 0, "wall_s": 0.0},
        world(1.0, 1, "a", "b", "c", "d"),
        step(2.0, 1, 1),
        {"t": 10.25, "kind": "MemberLost", "member": "d", "cause": "process died", "evidence": ""},
        world(10.25, 2, "a", "b", "c"),
        *(of(10.5, "WorldCalledOff", one, 1) for one in "bc"),
        of(10.75, "WorldBroken", "a", 1, evidence=""),
        *(of(11.0, "WorldBroken", one, 1, evidence="") for one in "bc"),
        *(of(11.125, "WorldFormed", one, 2, seconds=0.1) for one in "abc"),
        step(12.0, 2, 2),
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(each) + "\n" for each in moments))
    story = Story(tmp_path)
    story.update()
    assert measured(story, 10.0) == Recovery(
        next_step_s=2.0,
        full_strength_s=inf,
        detect_s=0.25,
        know_s=0.5,
        leave_s=0.75,
        regroup_s=0.125,
        step_s=0.5,
        redone_steps=0,
    )
