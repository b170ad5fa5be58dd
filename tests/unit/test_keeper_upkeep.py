"""Far tiers get what is due to them, however they fail, and never hold up a save; all tiers are pruned."""

import threading
import time
from dataclasses import replace

import pytest

from checkpoint import Catalog, Durable, Failed, LatestN, LocalHost, Saver, Share, load, verify
from checkpoint.errors import StoreRefused
from checkpoint.keeper.upkeep import Upkeep, UpkeepPolicy
from checkpoint.lifecycle.policies import EverySteps
from checkpoint.lifecycle.tiers import Tier
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import RetryPolicy
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, closing_all, same_bits, small_state
from tests.wrapped_stores import Faulty, Lost

pytestmark = pytest.mark.usefixtures("quiet_retries")

FAST = UpkeepPolicy(poll_s=60.0, grace_s=1000.0, linger_s=0.0, retry=RetryPolicy(20.0, 0.001, 0.01))
KEEP_ALL = (EverySteps(1),)


class Stalled(MemoryStore):
    """A store whose requests hang until it is let go."""

    def __init__(self):
        super().__init__("stalled")
        self.go = threading.Event()
        self.asked = threading.Event()

    def list(self, prefix):
        self.asked.set()
        assert self.go.wait(20)
        return super().list(prefix)


class Run:
    """A run with a near store and far tiers, all in this process."""

    def __init__(self, near, tiers, far, *, keep=(), policy=FAST, run="run"):
        self.near = near
        self.host = LocalHost(near, arena_bytes=MIB, tuning=QUICK)
        stores = {tier.url: store for tier, store in zip(tiers, far, strict=True)}
        self.upkeep = Upkeep(near, self.host.intake, tiers, keep, policy, stores.__getitem__)
        self.saver = Saver(self.host, run, RAW)
        self.seen = []

    def save(self, *steps):
        for step in steps:
            self.saver.save(step, small_state(step), Share.alone(), {"metrics": {"loss": 1.0 / step}})
            assert self.saver.drain(20)
        return self

    def settled(self):
        """Wait until all tiers were looked after; list (kind, tier, step) of what was told."""
        assert self.upkeep.drain(20)
        self.seen += self.saver.outcomes()
        return sorted((type(one).__name__, one.tier, one.step) for one in self.seen)

    def close(self):
        self.upkeep.close()
        self.saver.close()
        self.host.close(flush_s=1.0)


@pytest.fixture
def run_of():
    with closing_all(Run) as make:
        yield make


def assert_whole(store, steps):
    assert Catalog(store).steps() == steps
    if steps:
        assert verify(store).is_sound
    for step in steps:
        assert same_bits(load(store, step).state, small_state(step))


def test_each_tier_gets_the_steps_that_are_due_to_it_and_it_is_told(run_of):
    near, ssd, far = MemoryStore("near"), MemoryStore("ssd"), MemoryStore("far")
    tiers = [Tier("ssd", every=2, keep=KEEP_ALL), Tier("far", every=4, keep=KEEP_ALL, name="s3")]
    run = run_of(near, tiers, [ssd, far]).save(*range(1, 9))
    told = run.settled()
    assert told == sorted(
        [("Durable", "store", step) for step in range(1, 9)]
        + [("Durable", "ssd", step) for step in (2, 4, 6, 8)]
        + [("Durable", "s3", step) for step in (4, 8)]
    )
    assert_whole(near, list(range(1, 9)))
    assert_whole(ssd, [2, 4, 6, 8])
    assert_whole(far, [4, 8])
    assert all(one.seconds > 0 and one.num_bytes > 0 for one in run.seen if one.tier == "s3")


def test_every_tier_is_pruned_by_its_own_policies(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run = run_of(near, [Tier("far", every=2, keep=(LatestN(2),))], [far], keep=[LatestN(3)])
    for step in range(1, 10):
        run.save(step).settled()
    assert_whole(near, [7, 8, 9])
    assert_whole(far, [6, 8])


def test_what_expired_on_a_tier_is_not_brought_there_again(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run = run_of(near, [Tier("far", keep=(LatestN(1),))], [far])
    told: list[tuple[str, str, int]] = []
    for step in range(1, 6):
        run.save(step)
        told = run.settled()
    assert len([one for one in told if one[1] == "far"]) <= 5 and ("Durable", "far", 5) in told
    assert_whole(far, [5])


def test_what_a_far_tier_lacks_does_not_expire_on_the_near_one(run_of):
    near, far = MemoryStore("near"), Stalled()
    run = run_of(near, [Tier("far", every=4, keep=(LatestN(1),))], [far], keep=[LatestN(1)])
    for step in range(1, 8):
        run.save(step)
    deadline = time.monotonic() + 20
    while Catalog(near).steps() != [4, 7]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    far.go.set()
    run.settled()
    run.save(9).settled()
    assert_whole(far, [4])
    assert_whole(near, [9])


def test_a_tier_that_hangs_holds_up_neither_a_save_nor_another_tier(run_of):
    near, ssd, far = MemoryStore("near"), MemoryStore("ssd"), Stalled()
    tiers = [Tier("ssd", keep=KEEP_ALL), Tier("far", keep=KEEP_ALL)]
    run = run_of(near, tiers, [ssd, far]).save(1)
    assert far.asked.wait(20)
    run.save(2, 3, 4)
    deadline = time.monotonic() + 20
    while Catalog(ssd).latest() != 4:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not run.upkeep.drain(0.01)
    far.go.set()
    run.settled()
    assert 4 in Catalog(far).steps() and verify(far).is_sound


@pytest.mark.parametrize("verb", ["put", "put_new", "list", "read"])
def test_a_tier_that_fails_for_a_while_is_asked_again_until_it_has_everything(run_of, verb):
    near, inner = MemoryStore("near"), MemoryStore("far")
    far = Faulty(inner, [Lost(verb, nth) for nth in (1, 2, 4, 5, 6, 9)])
    told = run_of(near, [Tier("far", keep=KEEP_ALL)], [far]).save(1, 2).settled()
    assert ("Durable", "far", 2) in told and not any(kind == "Failed" for kind, *_ in told)
    assert_whole(inner, [1, 2])


def test_a_tier_that_refuses_is_reported_once_per_step_and_gets_it_when_it_is_mended(run_of):
    class Refusing(MemoryStore):
        refuses = True

        def put(self, key, data):
            if self.refuses:
                raise StoreRefused("no permission, on purpose")
            super().put(key, data)

    near, far = MemoryStore("near"), Refusing("far")
    run = run_of(near, [Tier("far", keep=KEEP_ALL)], [far])
    for step in (1, 2):
        run.save(step).settled()
    failed = [one for one in run.seen if isinstance(one, Failed)]
    assert [(one.step, one.tier) for one in failed] == [(1, "far"), (2, "far")]
    assert "no permission" in failed[0].why
    assert_whole(near, [1, 2])
    far.refuses = False
    told = run.save(3).settled()
    assert {one[2] for one in told if one[:2] == ("Durable", "far")} == {1, 2, 3}
    assert_whole(far, [1, 2, 3])


def test_a_tier_that_does_not_answer_at_all_is_reported(run_of):
    near, inner = MemoryStore("near"), MemoryStore("far")
    far = Faulty(inner, [Lost("list", nth) for nth in range(1, 1000)])
    brief = replace(FAST, retry=RetryPolicy(0.01, 0.001, 0.002))
    told = run_of(near, [Tier("far", keep=KEEP_ALL)], [far], policy=brief).save(1).settled()
    assert ("Failed", "far", 1) in told and ("Durable", "store", 1) in told


def test_what_was_due_before_the_process_started_is_found_by_comparing_the_tiers(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run_of(near, [], []).save(1, 2, 3)
    run = run_of(near, [Tier("far", keep=KEEP_ALL)], [far])
    run.saver.save(4, small_state(4), Share.alone(generation=1), {})
    assert run.saver.drain(20)
    run.settled()
    assert_whole(far, [1, 2, 3, 4])


def test_a_checkpoint_that_another_run_left_on_a_tier_is_no_hindrance(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    other = run_of(far, [], [])
    other.saver.save(1, {"something": 1}, Share.alone(), {})
    assert other.saver.drain(20)
    run = run_of(near, [Tier("far", keep=KEEP_ALL)], [far])
    told = run.save(1, 2).settled()
    assert ("Durable", "far", 2) in told
    run.save(3).settled()
    assert Catalog(far).steps() == [1, 2, 3]


def test_only_the_host_of_the_first_rank_looks_after_the_tiers(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run = run_of(near, [Tier("far", keep=KEEP_ALL)], [far])
    assert not run.host.intake.leads
    run.saver.save(1, small_state(1), Share(0, 1, 2, ("b", "local")), {})
    run.saver.wait_captured()
    assert not run.host.intake.leads
    run.saver.save(2, small_state(2), Share(1, 0, 1, ("local",)), {})
    assert run.saver.wait_captured() >= 0 and run.host.intake.leads


def test_tiers_that_do_not_fit_each_other_are_refused_at_once():
    with pytest.raises(ValueError, match="multiple"):
        Upkeep(MemoryStore("n"), LocalHost(MemoryStore("n")).intake, [Tier("a", every=2), Tier("b", every=3)])


def test_durable_news_of_far_tiers_end_no_snapshot_twice(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run = run_of(near, [Tier("far", keep=KEEP_ALL)], [far]).save(1)
    run.settled()
    assert [type(one) for one in run.seen] == [Durable, Durable]


def test_another_run_s_checkpoints_are_neither_pruned_nor_counted_nor_brought_far(run_of):
    near, far = MemoryStore("near"), MemoryStore("far")
    run_of(near, [], [], run="theirs").save(1, 2, 3).settled()
    mine = replace(FAST, run="mine")
    run_of(near, [Tier("far", keep=(LatestN(1),))], [far], keep=(LatestN(1),), policy=mine, run="mine").save(
        4, 5, 6
    ).settled()
    assert Catalog(near).steps() == [1, 2, 3, 6]
    assert Catalog(far).steps() == [6]
    assert verify(near).is_sound
