"""Policies as values: what each keeps, what nothing may touch, and their round trip through text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Checkpointer, Tier
from checkpoint.lifecycle.policies import (
    BestByMetric,
    Candidate,
    EveryMinutes,
    EverySteps,
    LatestN,
    Pinned,
    Policy,
    WithinBytes,
    judge,
    parse_policies,
    parse_policy,
    policy_to_text,
)

TENS = range(10, 110, 10)
counts = st.integers(1, 50)
policies = st.one_of(
    st.builds(LatestN, counts),
    st.builds(EverySteps, counts),
    st.builds(EveryMinutes, st.floats(0.001, 1e6)),
    st.builds(
        BestByMetric,
        st.from_regex(r"[A-Za-z0-9._/-]{1,8}", fullmatch=True),
        st.sampled_from(["min", "max"]),
        counts,
    ),
    st.builds(Pinned, st.frozensets(st.integers(0, 200))),
    st.builds(WithinBytes, st.integers(1, 10_000)),
)


def at_minute(minute: float) -> str:
    hours, minutes = divmod(minute, 60)
    return f"2026-11-20T{int(hours):02d}:{int(minutes):02d}:{round(minutes % 1 * 60):02d}+00:00"


def kept(candidates, *by: Policy, protected=None) -> list[int]:
    return [one.step for one in judge(candidates, by, protected=protected) if one.is_kept]


def steps(*numbers: int) -> list[Candidate]:
    return [Candidate(step) for step in numbers]


@st.composite
def stores(draw):
    """Draw candidates that share some of their objects."""
    sizes = draw(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5000)))
    return [
        Candidate(
            step,
            at_minute(step),
            draw(st.dictionaries(st.just("loss"), st.floats())),
            {
                key: sizes[key]
                for key in draw(st.sets(st.sampled_from(sorted(sizes) or ["a"])))
                if key in sizes
            },
        )
        for step in draw(st.sets(st.integers(0, 200)))
    ]


def test_each_policy_keeps_what_its_name_says():
    assert kept(steps(*TENS), LatestN(3)) == [80, 90, 100]
    assert kept(steps(*TENS), LatestN(1), EverySteps(50)) == [50, 100]
    assert kept(steps(*TENS), LatestN(1), Pinned(frozenset({20, 999}))) == [20, 100]
    assert kept([], LatestN(1)) == []


def test_every_minutes_keeps_the_first_of_each_window_and_what_does_not_tell_its_time():
    made = [Candidate(step, at_minute(step)) for step in (1, 29, 30, 31, 59, 61, 95)]
    assert kept([*made, Candidate(33, "no time"), Candidate(200)], EveryMinutes(30)) == [
        1,
        30,
        33,
        61,
        95,
        200,
    ]


@given(st.sets(st.integers(0, 1000), min_size=1), st.integers(1, 200), st.data())
def test_pruning_as_time_goes_by_keeps_what_one_prune_at_the_end_would(minutes, window, data):
    made = [Candidate(minute, at_minute(minute)) for minute in sorted(minutes)]
    present: list[Candidate] = []
    for one in made:
        present.append(one)
        if data.draw(st.booleans()):
            stay = kept(present, EveryMinutes(window))
            present = [each for each in present if each.step in stay]
    assert kept(present, EveryMinutes(window)) == kept(made, EveryMinutes(window))


def test_the_best_are_those_with_the_lowest_or_highest_metric_and_the_newer_of_equals():
    losses = {1: 3.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: 2.0, 6: -math.inf}
    scored = [*(Candidate(step, metrics={"loss": loss}) for step, loss in losses.items()), Candidate(7)]
    assert kept(scored, BestByMetric("loss")) == [4, 7]
    assert kept(scored, BestByMetric("loss", "min", 3)) == [2, 4, 5, 7]
    assert kept(scored, BestByMetric("loss", "max", 1)) == [1, 7]
    assert kept(scored, BestByMetric("accuracy", "max", 5)) == [7]


def test_a_budget_lets_the_oldest_go_until_the_rest_fits_and_counts_shared_objects_once():
    made = [Candidate(step, objects={f"own{step}": 10, "shared": 100}) for step in (1, 2, 3, 4)]
    assert kept(made, WithinBytes(140)) == [1, 2, 3, 4]
    assert kept(made, WithinBytes(139)) == [2, 3, 4]
    assert kept(made, WithinBytes(1)) == [4]
    assert kept(made, LatestN(3), WithinBytes(120)) == [3, 4]
    assert kept(made, Pinned(frozenset({1})), WithinBytes(1)) == [1, 4]
    assert kept(made, WithinBytes(1), protected={2: "tagged best"}) == [2, 4]


@settings(max_examples=50)
@given(stores(), st.lists(policies, min_size=1), st.sets(st.integers(0, 200)))
def test_the_newest_the_pinned_and_the_protected_never_expire(candidates, by, protect):
    verdicts = judge(candidates, by, protected=dict.fromkeys(protect, "protected"))
    assert [one.step for one in verdicts] == sorted(one.step for one in candidates)
    gone = {one.step for one in verdicts if not one.is_kept}
    pinned = {step for policy in by if isinstance(policy, Pinned) for step in policy.steps}
    assert not gone & (protect | pinned | {max((one.step for one in candidates), default=-1)})
    assert all(one.why for one in verdicts)


@settings(max_examples=50)
@given(stores(), st.lists(policies, min_size=1), policies)
def test_another_policy_that_keeps_never_makes_a_checkpoint_expire(candidates, by, other):
    by = [policy for policy in by if not isinstance(policy, WithinBytes)]
    if by and not isinstance(other, WithinBytes):
        assert set(kept(candidates, *by)) <= set(kept(candidates, *by, other))


@settings(max_examples=50)
@given(stores(), st.lists(policies, min_size=1), st.integers(1, 20_000))
def test_what_stays_fits_the_budget_or_is_what_may_not_go(candidates, by, num_bytes):
    stay = kept(candidates, *by, WithinBytes(num_bytes))
    objects = {key: size for one in candidates if one.step in stay for key, size in one.objects.items()}
    pinned = {step for policy in by if isinstance(policy, Pinned) for step in policy.steps}
    assert sum(objects.values()) <= num_bytes or set(stay) <= pinned | {max(stay)}


@settings(max_examples=50)
@given(stores(), st.lists(policies, min_size=1))
def test_a_second_judgement_changes_nothing(candidates, by):
    stay = set(kept(candidates, *by))
    assert set(kept([one for one in candidates if one.step in stay], *by)) == stay


def test_no_policy_is_no_licence_to_delete():
    with pytest.raises(ValueError, match="at least one"):
        judge(steps(1, 2), [])


@given(policies)
def test_a_policy_is_the_same_after_it_was_text(policy):
    assert parse_policy(policy_to_text(policy)) == policy


def test_policies_are_written_as_the_manual_says():
    assert policy_to_text(Pinned(frozenset({20, 10}))) == "pinned:10,20"
    assert parse_policy("best:val/loss") == BestByMetric("val/loss", "min", 1)
    assert parse_policy("best:accuracy:max") == BestByMetric("accuracy", "max", 1)
    assert parse_policy("minutes:30") == EveryMinutes(30)


NO_POLICIES = """
    latest latest:0 latest:x every:-1 minutes:0 minutes:nan best:loss:avg:1 best::min best:a,b best:loss:min:0
    pinned:a bytes:0 keep:3 latest:3:4
"""


@pytest.mark.parametrize("text", ["", *NO_POLICIES.split()])
def test_what_is_no_policy_is_refused_with_what_would_be_one(text):
    with pytest.raises(ValueError, match="write latest:3, every:100"):
        parse_policy(text)


@pytest.mark.parametrize("keep", ["latest:3", ["latest:3"], LatestN(3), (LatestN(3),), iter(["latest:3"])])
def test_policies_may_be_given_as_one_or_several_as_values_or_as_text(keep):
    assert parse_policies(keep) == (LatestN(3),)


@pytest.mark.parametrize("keep", [["latest"], "all", 3, [None]])
def test_what_is_no_policy_is_refused_where_it_is_given(keep):
    for make in (
        parse_policies,
        lambda given: Tier("x", keep=given),
        lambda given: Checkpointer("x", keep=given),
    ):
        with pytest.raises(ValueError, match="no retention policy"):
            make(keep)
