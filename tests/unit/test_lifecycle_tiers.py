"""Tiers as values: their rules against each other, and their round trip through plain data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.lifecycle.policies import LatestN, WithinBytes
from checkpoint.lifecycle.tiers import Tier, check_tiers, is_due, parse_tier, tier_to_json
from tests.unit.test_lifecycle_policies import policies

tiers = st.builds(
    Tier,
    st.text(min_size=1),
    st.integers(1, 1000),
    st.lists(policies, min_size=1).map(tuple),
    st.text(),
    st.none() | st.integers(1, 1 << 50),
)


@given(tiers)
def test_a_tier_is_the_same_after_it_was_json(tier):
    assert parse_tier(json.loads(json.dumps(tier_to_json(tier)))) == tier


def test_what_a_tier_leaves_out_has_its_default():
    assert parse_tier({"url": "s3://bucket/run"}) == Tier("s3://bucket/run")
    assert Tier("/disk").label == "/disk" and Tier("/disk", name="disk").label == "disk"
    assert Tier("/disk", budget_bytes=7).policies == (LatestN(3), WithinBytes(7))
    assert [step for step in range(1, 13) if is_due(Tier("/disk", every=4), step)] == [4, 8, 12]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"url": ""},
        {"url": "/a", "every": 0},
        {"url": "/a", "every": True},
        {"url": "/a", "keep": "latest:3"},
        {"url": "/a", "keep": []},
        {"url": "/a", "keep": ["latest:0"]},
        {"url": "/a", "budget_bytes": 0},
        {"url": "/a", "evry": 3},
    ],
)
def test_what_is_no_tier_is_refused(data):
    with pytest.raises(ValueError, match=r"tier|policy|budget"):
        parse_tier(data)


def test_tiers_that_do_not_fit_each_other_are_refused_by_name():
    check_tiers([Tier("/a", 2), Tier("/b", 2), Tier("/c", 10)])
    with pytest.raises(ValueError, match=r"s3://far is to hold every 15 .* nearer /near"):
        check_tiers([Tier("/near", 10), Tier("s3://far", 15)])
    with pytest.raises(ValueError, match="two tiers are called 'disk'"):
        check_tiers([Tier("/a", name="disk"), Tier("/b", name="disk")])
    with pytest.raises(ValueError, match="two tiers are called '/a'"):
        check_tiers([Tier("/a", name="one"), Tier("/a", name="other")])
