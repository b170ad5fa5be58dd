"""A real keeper process: joined, left, ended, and what it says when it cannot start."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from checkpoint import (
    ArenaFull,
    Catalog,
    Failed,
    KeeperConfig,
    KeeperHost,
    Saver,
    Share,
    StoreUnavailable,
    connect,
    load,
    open_store,
)
from checkpoint.keeper.settings import config_to_text
from tests.fault.checkpoint_worlds import MIB, at_once, durable_steps, same_bits, small_state

pytestmark = pytest.mark.slow
PARENT = """
import os, signal, sys
from pathlib import Path
from checkpoint import connect
from checkpoint.keeper.settings import parse_config
host = connect(parse_config(sys.argv[1], Path(sys.argv[2])))
if child := os.fork():
    print(child, flush=True)
signal.pause()
"""


@pytest.fixture
def config(tmp_path):
    config = KeeperConfig(
        run="run",
        host="h0",
        store_url=str(tmp_path / "store"),
        arena_bytes=8 * MIB,
        lease_s=0.3,
        directory=tmp_path / "keeper",
    )
    yield config
    with suppress(OSError, ValueError):
        os.kill(int(config.life_lock_path.read_text()), signal.SIGKILL)


def keeper_pid(config: KeeperConfig) -> int:
    return int(config.life_lock_path.read_text())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_a_keeper_saves_lives_in_its_own_session_and_ends_by_its_lease(config):
    with connect(config) as host:
        pid = keeper_pid(config)
        assert os.getsid(pid) != os.getsid(0)
        saver = Saver(host, "run")
        saver.save(1, small_state(1), Share.alone("h0"), {})
        assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
        saver.close()
    assert same_bits(load(open_store(config.store_url)).state, small_state(1))
    assert ends_within(pid, 10)
    assert not config.home.exists()


def test_what_is_captured_when_its_saver_leaves_becomes_durable(config):
    host = connect(config)
    pid = keeper_pid(config)
    saver = Saver(host, "run")
    saver.save(1, small_state(1), Share.alone("h0"), {})
    saver.wait_captured()
    saver.close()
    host.close()
    assert ends_within(pid, 10)
    assert Catalog(open_store(config.store_url)).latest() == 1


def test_clients_that_come_at_once_share_one_keeper_and_one_manifest(config):
    hosts = []
    at_once([lambda: hosts.append(connect(config)) for _ in range(4)])
    savers = [Saver(host, "run") for host in hosts]
    for step in (1, 2):
        for rank, saver in enumerate(savers):
            saver.save(step, small_state(step), Share(1, rank, 4, ("h0",) * 4), {})
        assert all(saver.drain(20) for saver in savers)
        assert [durable_steps(saver.outcomes()) for saver in savers] == [[step]] * 4
    assert config.log_path.read_text().count("keeping run") == 1
    for saver, host in zip(savers, hosts, strict=True):
        saver.close()
        host.close()
    assert Catalog(open_store(config.store_url)).steps() == [1, 2]


def test_a_killed_trainer_is_gone_for_its_keeper_though_a_child_of_its_lives_on(config):
    arguments = [sys.executable, "-c", PARENT, config_to_text(config), str(config.directory)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        try:
            connect(replace(config, hold=2)).close()  # else refused, as the other one's settings differ
        finally:
            os.kill(child, signal.SIGKILL)


def test_sigterm_flushes_and_ends(config):
    host = connect(config)
    saver = Saver(host, "run")
    saver.save(1, small_state(1), Share.alone("h0"), {})
    saver.wait_captured()
    pid = keeper_pid(config)
    os.kill(pid, signal.SIGTERM)
    assert ends_within(pid, 10)
    assert saver.drain(10)
    saver.close()
    host.close()
    assert Catalog(open_store(config.store_url)).latest() == 1


def test_clients_that_come_while_a_keeper_ends_find_it_or_start_another(config):
    hasty = replace(config, lease_s=0.2)
    hosts: list[KeeperHost] = []
    pids = set()
    for number in range(6):
        at_once([lambda: hosts.append(connect(hasty)) for _ in range(2)])
        pids.add(keeper_pid(hasty))
        while hosts:
            hosts.pop().close()
        time.sleep(0.1 * number)  # the keeper looks after its lease four times a second
    assert len(pids) > 1
    assert all(ends_within(pid, 10) for pid in pids)
    assert not hasty.home.exists()


def test_a_keeper_that_does_not_end_in_order_leaves_its_log(config):
    with connect(config) as host:
        pid = keeper_pid(config)
        saver = Saver(host, "run")
        saver.save(1, small_state(1), Share.alone("h0"), {})
        assert saver.drain(20)
        os.kill(pid, signal.SIGKILL)
        assert ends_within(pid, 10)
        saver.close()
    assert "keeping run" in config.log_path.read_text()


def test_a_keeper_whose_directory_was_taken_over_leaves_it_alone(config, tmp_path):
    with connect(config):
        first = keeper_pid(config)
        config.home.rename(tmp_path / "swept")
        with connect(config) as successor:
            os.kill(first, signal.SIGTERM)
            assert ends_within(first, 10)
            saver = Saver(successor, "run")
            saver.save(1, small_state(1), Share.alone("h0"), {})
            assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
            saver.close()
            assert config.socket_path.exists()


def test_a_keeper_that_cannot_write_its_store_says_so_at_once(config, tmp_path):
    (tmp_path / "store").write_text("a file where a directory is needed")
    with pytest.raises(StoreUnavailable, match="store"):
        connect(config)


def test_an_arena_too_large_for_the_machine_is_one_clear_error(tmp_path):
    config = KeeperConfig("run", "h0", str(tmp_path / "s"), arena_bytes=1 << 50, directory=tmp_path / "k")
    with pytest.raises(ArenaFull, match=r"checkpoint\.arena_mib"):
        connect(config)


def test_a_state_larger_than_the_arena_is_one_clear_outcome_through_the_keeper(config):
    with connect(config) as host:
        saver = Saver(host, "run")
        saver.save(1, {"w": torch.zeros(3 * MIB)}, Share.alone("h0"), {})
        assert saver.drain(20)
        (told,) = saver.outcomes()
        assert isinstance(told, Failed) and "raise `checkpoint.arena_mib` to at least 12" in told.why
        saver.close()
