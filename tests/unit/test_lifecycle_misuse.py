"""What is given to a door of lifecycle and is no such thing is refused at once, by its name."""

from pathlib import Path
from typing import Any

import pytest

import checkpoint
from checkpoint import EveryMinutes, EverySteps, LatestN, Pace, Pinned, Tier, WithinBytes
from checkpoint.store.memory import MemoryStore
from tests.format_samples import write_checkpoint

PLACE = Path("runs/first/store")


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore("misused")
    write_checkpoint(store, 1)
    return store


def prune(*given: Any, **named: Any) -> None:
    checkpoint.prune(*given, **{"now_s": 0.0, "grace_s": 0.0, **named})


@pytest.mark.parametrize(
    ("policies", "told"),
    [
        (LatestN(1), r"`policies` are several, in a list, each a LatestN or .*: not LatestN\(n=1\)"),
        ("latest:1", "`policies` are several, in a list, .*: not 'latest:1'"),
        (["latest:1"], "`each of policies` is a LatestN or .*, not 'latest:1'"),
        ((one for one in [LatestN(1)]), "`policies` are several, in a list, .*: not <generator"),
        (None, "`policies` are several, .*: not None"),
    ],
)
def test_policies_that_are_none_are_refused_by_name_and_nothing_is_deleted(store, policies, told):
    write_checkpoint(store, 2)
    before = store.list("")
    with pytest.raises(TypeError, match=told):
        prune(store, policies)
    assert store.list("") == before


@pytest.mark.parametrize("given", ["runs/first/store", PLACE, None, MemoryStore])
def test_a_place_that_is_no_store_is_refused_by_every_door(store, given):
    door: Any = checkpoint
    for call in (
        lambda: prune(given, [LatestN(1)]),
        lambda: door.verify(given),
        lambda: door.repair(given, 1, store),
        lambda: door.repair(store, 1, given),
        lambda: door.promote(given, store, 1),
        lambda: door.promote(store, given, 1),
        lambda: door.set_aside(given, 1, "why"),
        lambda: door.tag(given, "best", 1),
        lambda: door.untag(given, "best"),
        lambda: door.tags(given),
        lambda: door.record_score(given, 1, {}),
    ):
        with pytest.raises(TypeError, match=r"is a Store, not .*: `open_store` makes one of a URL"):
            call()


@pytest.mark.parametrize("step", ["1", 1.0, [1]])
def test_a_step_that_is_no_whole_number_is_refused_by_every_door(store, step):
    door: Any = checkpoint
    for call in (
        lambda: door.verify(store, step),
        lambda: door.repair(store, step, store),
        lambda: door.promote(store, store, step),
        lambda: door.set_aside(store, step, "why"),
        lambda: door.tag(store, "best", step),
        lambda: door.record_score(store, step, {}),
    ):
        with pytest.raises(TypeError, match="`step` is a whole number, not "):
            call()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda door, store: door.verify(store, pace=1e6), "`pace` is a Pace or None, not 1000000.0"),
        (lambda door, store: prune(store, [LatestN(1)], grace_s="60"), "`grace_s` is a number of seconds"),
        (lambda door, store: prune(store, [LatestN(1)], run=3), "`run` is a str or None, not 3"),
        (
            lambda door, store: door.set_aside(store, 1, "why", policy="bad"),
            "'damaged' or 'abandoned', not 'bad'",
        ),
        (lambda door, store: door.tag(store, 1, 1), "`name` is a str, not 1"),
        (lambda door, store: door.untag(store, 1), "`name` is a str, not 1"),
        (lambda door, store: door.record_score(store, 1, 0.5), "`metrics` is a Mapping, not 0.5"),
        (lambda door, store: door.check_tiers(Tier("/a")), "`tiers` are several, .* each a Tier: not Tier"),
        (lambda door, store: door.parse_policy(LatestN(1)), "`text` is a str, not LatestN"),
        (lambda door, store: door.Tier(PLACE), "`url` is a str, not .*Path"),
        (lambda door, store: door.Tier("/a", every="2"), "`every` is a int, not '2'"),
        (lambda door, store: door.BestByMetric(3), "`metric` is a str, not 3"),
    ],
)
def test_anything_else_is_refused_by_its_name(store, call, told):
    with pytest.raises((TypeError, ValueError), match=told):
        call(checkpoint, store)


@pytest.mark.parametrize("policy", [LatestN, EverySteps, EveryMinutes, WithinBytes, Pinned, Pace])
def test_a_number_that_is_text_is_refused_where_it_is_given(policy):
    with pytest.raises(TypeError, match="'3'"):
        policy("3")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget_bytes": "1G"}, TypeError, "`budget_bytes` is a whole number of 1 or more, not '1G'"),
        ({"budget_bytes": 0}, ValueError, "`budget_bytes` is a whole number of 1 or more, not 0"),
        ({"since_s": "yesterday"}, TypeError, "`since_s` is a number of seconds, not 'yesterday'"),
        ({"since_s": float("nan")}, ValueError, "`since_s` is a number of seconds, 0 or more, not nan"),
    ],
)
def test_a_scrub_that_is_given_no_number_says_so(store, options, error, words):
    with pytest.raises(error, match=words):
        checkpoint.verify(store, **options)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": "abc"}, r"`metrics\['loss'\]` is a Real, not 'abc'"),
        ({"loss": None}, r"`metrics\['loss'\]` is a Real, not None"),
        ({3: 0.5}, "`a metric's name` is a str, not 3"),
    ],
)
def test_a_score_that_is_no_number_is_refused_by_name(store, metrics, words):
    with pytest.raises(TypeError, match=words):
        checkpoint.record_score(store, 1, metrics)
