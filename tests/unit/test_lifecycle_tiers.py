"""Tiers as values: their rules against each other, and their round trip through plain data."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.keeper import KeeperConfig
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
    with pytest.raises(ValueError, match=r"tier 'one' \(/a\) and tier 'other' \(/a\) are the same place"):
        check_tiers([Tier("/a", name="one"), Tier("/a", name="other")])


def spellings(place) -> list[str]:
    """Write a directory in ways that all mean it."""
    (place.parent / "link").symlink_to(place)
    return [
        f"file://{place}", f"file://localhost{place}/", f"FILE://{place}", f"local://{place}", f"{place}/",
        f"{place}/../{place.name}", f"./{place.name}", str(place.parent / "link"), f"file://{place}/x/..",
    ]  # fmt: skip


def test_a_far_tier_that_is_the_near_store_by_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spelling in spellings(tmp_path / "near"):
        for near, far in ((str(tmp_path / "near"), spelling), (spelling, str(tmp_path / "near"))):
            with pytest.raises(ValueError, match=r"tier 'near' .* and tier 'far' .* are the same place"):
                check_tiers([Tier(near, name="near"), Tier(far, name="far")])
        with pytest.raises(ValueError, match=r"the store .* same place"):
            KeeperConfig("run", "host", str(tmp_path / "near"), far=(Tier(spelling),))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("s3://bucket/run", "S3://Bucket//run/"),
        ("s3://bucket/run", "obstore+s3://bucket/run"),
        ("s3://bucket/run", "s3a://bucket/x/../run"),
        ("gs://bucket", "gcs://bucket/"),
    ],
)
def test_one_prefix_of_a_bucket_is_one_place_however_it_is_spelled(one, other):
    with pytest.raises(ValueError, match="are the same place"):
        check_tiers([Tier(one, name="a"), Tier(other, name="b")])
    check_tiers([Tier(one, name="a"), Tier(f"{other.rstrip('/')}-2".lower(), name="b")])


@pytest.mark.parametrize(
    ("outer", "inner"), [("/mnt/near", "/mnt/near/far"), ("s3://bucket", "s3://bucket/far"), ("/", "/x")]
)
def test_a_tier_within_another_is_refused_from_either_side(outer, inner):
    for near, far in ((outer, inner), (inner, outer)):
        with pytest.raises(ValueError, match="'in' lies within tier 'out'"):
            check_tiers([Tier(each, name="in" if each == inner else "out") for each in (near, far)])
    check_tiers([Tier("/mnt/near"), Tier("/mnt/near2"), Tier("s3://bucket/mnt/near")])
