"""A real keeper process with far tiers: one that fails costs no save; a successor brings what is missing."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from checkpoint import (
    Catalog,
    Durable,
    Failed,
    KeeperConfig,
    LatestN,
    Saver,
    Share,
    connect,
    open_store,
    verify,
)
from checkpoint.engine.contract import Outcome
from checkpoint.keeper.settings import config_to_text, parse_config
from checkpoint.lifecycle.policies import BestByMetric, EverySteps
from checkpoint.lifecycle.tiers import Tier
from tests.fault.checkpoint_worlds import MIB, durable_steps, small_state

SHARE = Share.alone("h0")


@pytest.fixture
def config(tmp_path):
    config = KeeperConfig(
        run="run",
        host="h0",
        store_url=str(tmp_path / "near"),
        arena_bytes=4 * MIB,
        lease_s=0.5,
        keep=(LatestN(2),),
        far=(Tier(str(tmp_path / "far"), every=2, keep=(EverySteps(1),), name="far"),),
        directory=tmp_path / "keeper",
    )
    yield config
    with suppress(OSError, ValueError):
        os.kill(int(config.life_lock_path.read_text()), signal.SIGKILL)


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_what_a_keeper_is_told_comes_out_as_it_went_in(tmp_path):
    config = KeeperConfig(
        run="run",
        host="h0",
        store_url=f"file://{tmp_path}/near",
        hold=3,
        keep=(LatestN(3), BestByMetric("loss")),
        far=(Tier(f"file://{tmp_path}/far", 4, (EverySteps(8),), "far", 10**9), Tier("s3://bucket/x", 8)),
        directory=tmp_path,
    )
    assert parse_config(config_to_text(config), tmp_path) == config


def test_tiers_that_do_not_fit_are_refused_before_any_process_starts():
    with pytest.raises(ValueError, match="multiple"):
        KeeperConfig("run", "h0", "near", far=(Tier("a", every=2), Tier("b", every=3)))


@pytest.mark.slow
def test_a_keeper_prunes_its_store_and_brings_what_is_due_to_its_far_tier_before_it_ends(config, tmp_path):
    with connect(config) as host:
        saver = Saver(host, "run")
        for step in range(1, 7):
            saver.save(step, small_state(step), SHARE, {})
            assert saver.drain(20)
        saver.close()
    assert eventually(lambda: not config.home.exists())
    near, far = open_store(str(tmp_path / "near")), open_store(str(tmp_path / "far"))
    assert Catalog(near).steps() == [5, 6] and verify(near).is_sound
    assert Catalog(far).steps() == [2, 4, 6] and verify(far).is_sound


@pytest.mark.slow
def test_a_far_tier_that_cannot_be_used_costs_no_save_is_reported_and_is_caught_up_with_by_the_next_keeper(
    config, tmp_path
):
    (tmp_path / "far").write_text("a file where a directory is needed")
    seen: list[Outcome] = []
    with connect(config) as host:
        saver = Saver(host, "run")
        for step in range(1, 4):
            saver.save(step, small_state(step), SHARE, {})
            assert saver.drain(20)
            seen += saver.outcomes()
        assert durable_steps(tuple(seen)) == [1, 2, 3]

        def is_told():
            seen.extend(saver.outcomes())
            return any(isinstance(one, Failed) and one.tier == "far" for one in seen)

        assert eventually(is_told)
        os.kill(int(config.life_lock_path.read_text()), signal.SIGKILL)
        (tmp_path / "far").unlink()
        saver.save(5, small_state(5), SHARE, {})
        assert saver.drain(30)
        seen += saver.outcomes()

        def is_there():
            seen.extend(saver.outcomes())
            return any(isinstance(one, Durable) and (one.tier, one.step) == ("far", 2) for one in seen)

        assert eventually(is_there), "step 2 was due before the keeper died"
        saver.close()
    assert verify(open_store(str(tmp_path / "far"))).is_sound


@pytest.mark.slow
def test_a_config_without_tiers_starts_a_keeper_that_deletes_nothing(config, tmp_path):
    with connect(replace(config, keep=(), far=())) as host:
        saver = Saver(host, "run")
        for step in range(1, 6):
            saver.save(step, small_state(step), SHARE, {})
            assert saver.drain(20)
        saver.close()
    assert Catalog(open_store(str(tmp_path / "near"))).steps() == [1, 2, 3, 4, 5]
