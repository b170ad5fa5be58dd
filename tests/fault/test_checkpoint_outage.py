"""A real S3 gateway that dies or hangs in the middle of saves and promotions: nothing is lost by it."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import (
    Catalog,
    Durable,
    Failed,
    KeeperConfig,
    LatestN,
    LocalHost,
    Outcome,
    Saver,
    Share,
    Store,
    Tier,
    connect,
    load,
    open_store,
)
from checkpoint.engine.contract import Depth
from checkpoint.engine.source import HeldSource
from checkpoint.lifecycle.promotion import promote
from checkpoint.store.memory import MemoryStore
from checkpoint.store.objects import ObjectStore
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.contract.s3_suite import BUCKET, served
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, assert_whole, durable_steps, run_state, same_bits
from tests.s3_server import S3Server
from tests.wrapped_stores import Metered

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_retries")]

SOON = RetryPolicy(deadline_s=30.0, first_wait_s=0.01, longest_wait_s=0.1)
PATIENT = replace(QUICK, outage_s=60.0)
SHARE = Share.alone("h0")
PATIENCE_S = 20.0
NUM_IN_MEMORY = 200  # many times what the arena has room for
NUM_WRITES = (
    4  # of a save: a pack, a page, a receipt, the manifest; of a promotion: itself announced, no receipt
)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with served() as server:
        yield server


class Striking:
    """A store that does something just before, or just after, its `nth` write."""

    def __init__(self, store: Store, nth: int, act: Callable[[], None], *, is_after: bool) -> None:
        self._store, self._left, self._act, self._is_after = store, nth, act, is_after
        self._lock = threading.Lock()

    def __getattr__(self, verb: str):
        call = getattr(self._store, verb)
        return call if verb not in ("put", "put_new") else lambda key, data: self._write(call, key, data)

    def __str__(self) -> str:
        return str(self._store)

    def _write(self, call, key, data) -> None:
        with self._lock:
            self._left -= 1
            is_due = self._left == 0
        if is_due and not self._is_after:
            self._act()
        call(key, data)
        if is_due and self._is_after:
            self._act()


@pytest.fixture
def outage(server: S3Server):
    """Kill the gateway; it is started again once a request was refused, or in the end."""
    is_away = threading.Event()

    def begin() -> None:
        server.kill_gateway()
        is_away.set()

    def end_when_asked_again() -> bool:
        if is_away.is_set():
            is_away.clear()
            server.start_gateway()
        return True

    yield begin, end_when_asked_again
    end_when_asked_again()


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("k", range(1, NUM_WRITES + 1))
def test_a_save_outlasts_an_outage_that_begins_at_any_of_its_writes(outage, k, is_after):
    begin, end = outage
    url = f"s3://{BUCKET}/save/{k}{is_after:d}"
    store = Retrying(Striking(ObjectStore(url), k, begin, is_after=is_after), SOON, may_go_on=end)
    with LocalHost(store, arena_bytes=MIB, tuning=PATIENT) as host:
        saver = Saver(host, "run", RAW)
        told: tuple[Outcome, ...] = ()
        for step in (1, 2):
            saver.save(step, run_state(step), Share.alone(), {})
            assert saver.drain(60)
            told += saver.outcomes()
        saver.close()
    end()
    assert durable_steps(told) == [1, 2]
    assert_whole(open_store(url), [1, 2], run_state)


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("k", range(1, NUM_WRITES + 1))
def test_a_promotion_outlasts_an_outage_that_begins_at_any_of_its_writes(outage, k, is_after):
    begin, end = outage
    near = MemoryStore("near")
    with LocalHost(near, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", RAW)
        saver.save(1, run_state(1), Share.alone(), {})
        assert saver.drain(20)
        saver.close()
    url = f"s3://{BUCKET}/promotion/{k}{is_after:d}"
    metered = Metered(ObjectStore(url))
    promote(near, Retrying(Striking(metered, k, begin, is_after=is_after), SOON, may_go_on=end), 1)
    end()
    calls = metered.traffic().num_calls
    assert calls["put"] + calls["put_new"] >= NUM_WRITES
    assert_whole(open_store(url), [1], run_state)


@pytest.fixture
def keeper_of(server: S3Server):
    """Make configurations of keepers whose far or only store is the server; end the keepers."""
    configs: list[KeeperConfig] = []
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:

        def make(store_url: str, *far: Tier) -> KeeperConfig:
            home = Path(directory) / f"keeper{len(configs)}"
            configs.append(
                KeeperConfig(
                    "run", "h0", store_url, arena_bytes=4 * MIB, lease_s=30.0, hold=1, far=far, directory=home
                )
            )
            return configs[-1]

        yield make
        for config in configs:
            with suppress(OSError, ValueError):
                os.kill(int(config.life_lock_path.read_text()), signal.SIGKILL)


def await_told(saver: Saver, seen: list[Outcome], kind: type, tier: str, step: int) -> None:
    """Wait until something is told of a step on a tier; what was told before is in `seen`."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(
        isinstance(one, kind) and one.step == step and getattr(one, "tier", "") == tier for one in seen
    ):
        assert time.monotonic() < deadline, f"{kind.__name__} of step {step} on {tier!r} was not told: {seen}"
        seen += saver.outcomes()
        time.sleep(0.01)


def save(saver: Saver, step: int, depth: Depth = "store") -> None:
    saver.save(step, run_state(step), SHARE, {}, depth=depth)
    saver.wait_captured()


def test_a_save_of_a_keeper_outlasts_an_outage_of_its_store(server, keeper_of):
    config = keeper_of(f"s3://{BUCKET}/kept")
    with connect(config) as host:
        saver = Saver(host, "run", RAW)
        save(saver, 1)
        assert saver.drain(60)
        server.kill_gateway()
        try:
            save(saver, 2)
            save(saver, 3)
            assert not saver.drain(0)
        finally:
            server.start_gateway()
        assert saver.drain(60)
        assert not [one for one in saver.outcomes() if isinstance(one, Failed)]
        saver.close()
    assert_whole(open_store(config.store_url), [1, 2, 3], run_state)


def test_an_outage_of_the_store_does_not_take_the_memory_tier_along(server, keeper_of):
    """Memory is the nearest tier: it holds, and gives back, what is saved while the store is away."""
    config = keeper_of(f"s3://{BUCKET}/held")
    seen: list[Outcome] = []
    with connect(config) as host:
        saver = Saver(host, "run", RAW)
        save(saver, 1)
        assert saver.drain(60)
        server.kill_gateway()
        try:
            save(saver, 2)
            await_told(saver, seen, Durable, "memory", 2)
            for step in range(3, 3 + NUM_IN_MEMORY):
                save(saver, step, "memory")
                await_told(saver, seen, Durable, "memory", step)
            with host.held() as held:
                assert held is not None and held.manifest.step == 2 + NUM_IN_MEMORY
                assert same_bits(load([HeldSource(held)]).state, run_state(held.manifest.step))
        finally:
            server.start_gateway()
        await_told(saver, seen, Durable, "store", 2)
        saver.close()
    assert_whole(open_store(config.store_url), [1, 2], run_state)


def test_a_keeper_that_is_killed_while_its_store_is_away_costs_what_it_held_and_says_so(server, keeper_of):
    config = keeper_of(f"s3://{BUCKET}/killed")
    seen: list[Outcome] = []
    with connect(config) as host:
        saver = Saver(host, "run", RAW)
        save(saver, 1)
        assert saver.drain(60)
        server.kill_gateway()
        try:
            save(saver, 2)
            os.kill(int(config.life_lock_path.read_text()), signal.SIGKILL)
            await_told(saver, seen, Failed, "", 2)
        finally:
            server.start_gateway()
        save(saver, 3)
        assert saver.drain(60)
        saver.close()
    assert Catalog(open_store(config.store_url)).steps() == [1, 3]
    assert_whole(open_store(config.store_url), [1, 3], run_state)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_far_store_that_is_away_holds_up_nothing_and_gets_everything_later(
    server, keeper_of, tmp_path, how
):
    far = Tier(f"s3://{BUCKET}/far/{how}", keep=(LatestN(9),), name="far")
    config = keeper_of(str(tmp_path / "near"), far)
    seen: list[Outcome] = []
    with connect(config) as host:
        saver = Saver(host, "run", RAW)
        save(saver, 1)
        await_told(saver, seen, Durable, "far", 1)
        begin, end = {
            "dies": (server.kill_gateway, server.start_gateway),
            "hangs": (server.suspend_gateway, server.resume_gateway),
        }[how]
        begin()
        try:
            for step in (2, 3, 4):
                save(saver, step)
                assert saver.drain(30), "the near store waits for the far one"
        finally:
            end()
        for step in (2, 3, 4):
            await_told(saver, seen, Durable, "far", step)
        saver.close()
    for url in (config.store_url, far.url):
        assert_whole(open_store(url), [1, 2, 3, 4], run_state)
