"""Several ranks, several hosts: one manifest, agreed upon without a server."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from checkpoint import (
    Catalog,
    Failed,
    LocalHost,
    Mismatch,
    NoCheckpoint,
    Saver,
    Share,
    check_fits,
    claim_generation,
    flatten_state,
    load,
    specs_of,
    verify,
)
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, at_once, durable_steps, same_bits, small_state


@pytest.fixture
def store():
    return MemoryStore("worlds")


class World:
    """Ranks as savers of this process, on one or more hosts that share a store."""

    def __init__(self, store: MemoryStore, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts
        self.locals = {host: LocalHost(store, host, arena_bytes=4 * MIB, tuning=QUICK) for host in set(hosts)}
        self.sessions = [self.locals[host].session() for host in hosts]
        self.savers = [Saver(session, "run", RAW) for session in self.sessions]

    def save(self, step: int, state_of: Callable[[int], Any], generation: int = 1) -> None:
        def save(rank: int) -> None:
            share = Share(generation, rank, len(self.hosts), self.hosts)
            self.savers[rank].save(step, state_of(rank), share, {"rank": rank})

        at_once([partial(save, rank) for rank in range(len(self.hosts))])

    def save_equal(self, step: int) -> None:
        self.save(step, lambda _: small_state(step))

    def outcomes(self) -> list[Any]:
        assert all(saver.drain(20) for saver in self.savers)
        return [saver.outcomes() for saver in self.savers]

    def close(self) -> None:
        for saver in self.savers:
            saver.close()
        for host in self.locals.values():
            host.close(flush_s=1.0)


@pytest.fixture
def world_of(store):
    worlds = []

    def make(*hosts: str) -> World:
        worlds.append(World(store, hosts))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.mark.parametrize("hosts", [("a",) * 4, ("a", "b"), ("b", "a", "b", "c")])
def test_all_ranks_together_make_exactly_one_manifest(store, world_of, hosts):
    world = world_of(*hosts)
    for step in (10, 20):
        world.save_equal(step)
        assert [durable_steps(seen) for seen in world.outcomes()] == [[step]] * len(hosts)
    assert Catalog(store).steps() == [10, 20]
    assert same_bits(load(store, 10).state, small_state(10))
    assert same_bits(load(store).state, small_state(20))
    assert load(store).manifest.meta == {"rank": 0}
    assert verify(store).num_bad == 0


def test_each_byte_is_written_by_one_rank_only(store, world_of):
    world = world_of("a", "a", "b", "b")
    world.save(1, lambda _: {"w": torch.arange(3.0 * MIB / 4)})
    world.outcomes()
    assert sum(pack.num_bytes for pack in load(store).manifest.packs) < 3.1 * MIB


@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b")])
@pytest.mark.parametrize("change", ["value", "shape"])
def test_ranks_that_disagree_about_the_state_make_no_checkpoint(store, world_of, hosts, change):
    world = world_of(*hosts)
    others = {"value": {"w": torch.ones(9), "lr": 0.2}, "shape": {"w": torch.ones(8), "lr": 0.1}}
    world.save(1, lambda rank: {"w": torch.ones(9), "lr": 0.1} if rank == 0 else others[change])
    for seen in world.outcomes():
        assert any(isinstance(outcome, Failed) for outcome in seen)
    assert Catalog(store).latest() is None


def test_a_torn_share_of_one_host_fails_the_step_on_all_hosts_and_the_next_one_works(store, world_of):
    world = world_of("a", "b")
    session = world.sessions[1]
    honest = session.seal
    session.seal = lambda ticket: session.spoil(ticket, "torn on purpose")
    world.save_equal(1)
    for seen in world.outcomes():
        assert [type(outcome) for outcome in seen] == [Failed] and "torn on purpose" in seen[0].why
    session.seal = honest
    world.save_equal(2)
    world.outcomes()
    assert Catalog(store).steps() == [2]


def test_a_rank_that_goes_on_without_delivering_fails_that_step_at_once(store, world_of):
    world = world_of("a", "a")
    world.savers[0].save(1, small_state(1), Share(1, 0, 2, world.hosts), {})
    world.savers[0].wait_captured()
    world.save_equal(2)
    seen = world.outcomes()[0]
    assert [(type(one), one.step) for one in seen if isinstance(one, Failed)] == [(Failed, 1)]
    assert "rank 1 went on" in next(one.why for one in seen if isinstance(one, Failed))
    assert Catalog(store).steps() == [2]


def test_a_rank_that_comes_late_to_a_step_that_failed_already_does_not_wait_for_it(store, world_of):
    world = world_of("a", "a")
    world.sessions[0].seal = lambda ticket: world.sessions[0].spoil(ticket, "torn on purpose")
    world.savers[0].save(1, small_state(1), Share(1, 0, 2, world.hosts), {})
    assert world.savers[0].drain(20)
    assert [type(outcome) for outcome in world.savers[1].outcomes()] == [Failed]
    world.savers[1].save(1, small_state(1), Share(1, 1, 2, world.hosts), {})
    assert world.savers[1].drain(5)


def test_a_host_that_waits_for_a_dead_one_gives_up_soon_after_a_newer_generation_was_claimed(store, world_of):
    world = world_of("a", "b")
    world.savers[0].save(1, small_state(1), Share(1, 0, 2, world.hosts), {})
    assert not world.savers[0].drain(0.2)
    assert claim_generation(store, 2, "token")
    assert world.savers[0].drain(20)
    (outcome,) = world.savers[0].outcomes()
    assert isinstance(outcome, Failed) and "receipts did not come" in outcome.why


def test_the_manifest_carries_the_owner_s_token_and_the_spec_s_digest(store, world_of):
    claim_generation(store, 7, "me")
    world = world_of("a")
    world.savers[0].save(1, small_state(1), Share(7, 0, 1, ("a",)), {"spec_digest": "cafe"})
    world.outcomes()
    manifest = load(store).manifest
    assert (manifest.token, manifest.spec_digest, manifest.generation) == ("me", "cafe", 7)


def test_a_newest_checkpoint_that_lost_a_pack_is_passed_over_and_that_is_said(store, world_of):
    world = world_of("a")
    for step in (1, 2):
        world.save_equal(step)
        world.outcomes()
    store.delete(load(store).manifest.packs[0].key)
    loaded = load(store)
    assert loaded.manifest.step == 1 and same_bits(loaded.state, small_state(1))
    assert [fallback.step for fallback in loaded.report.fallbacks] == [2]
    assert "missing" in loaded.report.fallbacks[0].why
    with pytest.raises(Exception, match="missing"):
        load(store, 2)


def test_an_empty_store_has_no_checkpoint(store):
    assert Catalog(store).latest() is None
    with pytest.raises(NoCheckpoint, match="no checkpoint in the store yet"):
        load(store)
    with pytest.raises(NoCheckpoint, match="step 3"):
        load(store, 3)


def test_a_checkpoint_of_another_model_is_told_by_its_first_differing_tensors(store, world_of):
    world = world_of("a")
    world.save(1, lambda _: {"w": torch.ones(3), "b": torch.ones(2)})
    world.outcomes()
    manifest = load(store).manifest
    check_fits(specs_of(flatten_state({"w": torch.ones(3), "b": torch.ones(2)}).tensors), manifest)
    with pytest.raises(
        Mismatch, match=r"b: float32\[2\] in the checkpoint, absent.*w: float32\[3\].*float64\[3\]"
    ):
        check_fits(specs_of({"w": torch.ones(3).double()}), manifest)


def test_a_rank_that_died_before_it_delivered_holds_nobody_up_once_a_newer_world_saves(store, world_of):
    world = world_of("a", "a")
    world.savers[0].save(5, small_state(5), Share(1, 0, 2, ("a", "a")), {"rank": 0})
    world.savers[0].wait_captured()
    alone = Share(2, 0, 1, ("a",))
    world.savers[0].save(5, small_state(5), alone, {"rank": 0})
    assert world.savers[0].drain(20), (
        "the old world's snapshot has its outcome, though nothing newer is under way"
    )
    lost, *_ = [outcome for outcome in world.savers[0].outcomes() if isinstance(outcome, Failed)]
    assert (lost.generation, lost.step) == (1, 5)
    assert "rank 1" in lost.why
    assert Catalog(store).latest() == 5
