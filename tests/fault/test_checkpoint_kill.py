"""SIGKILL of real processes: what a trainer captured becomes durable, and a dead keeper is replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from checkpoint import (
    Catalog,
    Durable,
    Failed,
    KeeperConfig,
    KeeperLost,
    Saver,
    Share,
    connect,
    load,
    open_store,
    verify,
)
from checkpoint.keeper import client
from checkpoint.keeper.home import is_free
from checkpoint.keeper.messages import receive
from tests.fault.checkpoint_worlds import MIB, durable_steps, same_bits, small_state

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path):
    config = KeeperConfig(
        "run", "h0", str(tmp_path / "store"), arena_bytes=8 * MIB, lease_s=0.5, directory=tmp_path / "keeper"
    )
    yield config
    with suppress(OSError, ValueError):
        os.kill(keeper_pid(config), signal.SIGKILL)


def keeper_pid(config: KeeperConfig) -> int:
    return int(config.life_lock_path.read_text())


def start_trainers(root: Path, size: int) -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.fault.checkpoint_trainer", str(root)]
    return [
        subprocess.Popen([*command, str(rank), str(size)], start_new_session=True) for rank in range(size)
    ]


def diary(root: Path, rank: int, what: str) -> list[int]:
    """Read what a trainer said; its last line may be cut by its death."""
    path = root / f"diary{rank}"
    found = []
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        found += [step for key, step in json.loads(line).items() if key == what]
    return found


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_what_was_captured_by_trainers_that_were_killed_becomes_durable_without_them(config, tmp_path):
    size = 2
    trainers = start_trainers(tmp_path, size)
    assert eventually(lambda: all(len(diary(tmp_path, rank, "captured")) > 5 for rank in range(size)))
    pid = keeper_pid(config)
    for trainer in trainers:
        os.killpg(trainer.pid, signal.SIGKILL)
    for trainer in trainers:
        trainer.wait()
    captured = min(max(diary(tmp_path, rank, "captured")) for rank in range(size))
    acknowledged = {step for rank in range(size) for step in diary(tmp_path, rank, "durable")}
    store = open_store(config.store_url)
    assert eventually(lambda: is_gone(pid)), "the keeper outlived its lease"
    assert (Catalog(store).latest() or 0) >= captured
    assert acknowledged <= set(Catalog(store).steps())
    assert verify(store).num_bad == 0
    assert same_bits(load(store).state, small_state(load(store).manifest.step))


def test_a_keeper_that_was_killed_is_replaced_and_the_next_save_is_durable(config):
    with connect(config) as host:
        saver = Saver(host, "run")
        share = Share.alone("h0")
        for step in range(1, 7):
            saver.save(step, small_state(step), share, {})
            if step % 2 == 0:
                os.kill(keeper_pid(config), signal.SIGKILL)
        saver.save(7, small_state(7), share, {})
        assert saver.drain(30)
        outcomes = saver.outcomes()
        saver.close()
    told = {outcome.step: outcome for outcome in outcomes}
    assert set(told) == set(range(1, 8)), "a snapshot was lost without a word"
    store = open_store(config.store_url)
    assert set(durable_steps(outcomes)) <= set(Catalog(store).steps())
    assert all(isinstance(outcome, Durable | Failed) for outcome in outcomes)
    assert isinstance(told[7], Durable)
    assert verify(store).num_bad == 0


def test_a_dead_keeper_is_replaced_at_once_though_its_end_has_not_been_read_yet(config, monkeypatch):
    def receive_late(channel):
        try:
            return receive(channel)
        except KeeperLost:
            time.sleep(0.5)  # as on a busy machine, where the thread that reads has to wait for its turn
            raise

    monkeypatch.setattr(client, "receive", receive_late)
    with connect(config) as host:
        saver = Saver(host, "run")
        for step in (1, 2, 3):
            saver.save(step, small_state(step), Share.alone("h0"), {})
            assert saver.drain(20)
            os.kill(keeper_pid(config), signal.SIGKILL)
            assert eventually(lambda: is_free(config))
        saver.close()
        assert durable_steps(saver.outcomes()) == [1, 2, 3]


def test_a_captured_snapshot_that_died_with_its_keeper_is_reported_failed_and_not_passed_over(config):
    with connect(config) as host:
        saver = Saver(host, "run")
        saver.save(1, small_state(1), Share.alone("h0"), {})
        saver.wait_captured()
        os.kill(keeper_pid(config), signal.SIGKILL)
        assert saver.drain(20)
        (outcome,) = saver.outcomes()
        assert isinstance(outcome, Durable) or "keeper died" in outcome.why
        saver.save(2, small_state(2), Share.alone("h0"), {})
        assert saver.drain(20) and durable_steps(saver.outcomes()) == [2]
        saver.close()
    assert Catalog(open_store(config.store_url)).latest() == 2


def test_a_trainer_that_is_killed_alone_fails_its_world_s_step_and_its_successor_goes_on(config, tmp_path):
    trainers = start_trainers(tmp_path, 2)
    assert eventually(lambda: len(diary(tmp_path, 0, "durable")) > 3)
    os.killpg(trainers[1].pid, signal.SIGKILL)
    trainers[1].wait()
    last = max(diary(tmp_path, 0, "durable"))
    with connect(config) as host:
        os.killpg(trainers[0].pid, signal.SIGKILL)
        trainers[0].wait()
        saver = Saver(host, "run")
        saver.save(1_000_000, small_state(7), Share(2, 0, 1, ("h0",)), {})
        assert saver.drain(30) and 1_000_000 in durable_steps(saver.outcomes())
        saver.close()
    store = open_store(config.store_url)
    assert last in Catalog(store).steps() and Catalog(store).latest() == 1_000_000
    assert verify(store).num_bad == 0
