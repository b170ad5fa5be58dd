"""A keeper outlives trainers, settings, even its store: whoever comes next gets what was asked for, soon."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from checkpoint import (
    Checkpointer,
    Failed,
    KeeperBusy,
    KeeperConfig,
    LatestN,
    Options,
    ReadPolicy,
    Saver,
    Share,
    Tier,
    connect,
    open_store,
)
from checkpoint.engine.generations import claim_generation
from checkpoint.keeper.settings import config_to_text
from tests.fault.checkpoint_worlds import MIB, durable_steps, save_alone

pytestmark = pytest.mark.slow

VISITOR = """
import sys
from pathlib import Path
from checkpoint.keeper import connect
from checkpoint.keeper.settings import parse_config
with connect(parse_config(sys.argv[1], Path(sys.argv[2]))):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def options(tmp_path):
    tmp_path.chmod(0o700)
    yield Options(lease_s=30.0, directory=tmp_path / "keeper")
    with suppress(OSError, ValueError):
        os.kill(keeper_of(tmp_path), signal.SIGKILL)


@pytest.fixture
def config(tmp_path, options):
    return KeeperConfig(
        "run", "h0", str(tmp_path / "store"), arena_bytes=MIB, lease_s=30.0, directory=options.directory
    )


@pytest.fixture
def silent(monkeypatch):
    """The URL of a store on a server that takes every call and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield "s3://bucket/far"


def keeper_of(root) -> int:
    return int((root / "keeper" / "life.lock").read_text())


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def at(step: int, num: int = 100) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((num,), float(step))}


def train(url, options, *steps, num=100, **settings):
    """Save some steps, and leave when all are durable wherever they go; return the last one's Saving."""
    saving = None
    with Checkpointer(url, options=options, **settings) as checkpointer:
        for step in steps:
            saving = checkpointer.save(step, at(step, num))
            assert saving is not None
            for tier in saving.tiers:
                assert saving.durable(tier).result(20).step == step
    return saving


def test_a_store_that_was_deleted_and_made_anew_has_nothing_of_its_former_life(tmp_path, options):
    url = str(tmp_path / "store")
    train(url, options, 1, 2, 3, memory=1)
    shutil.rmtree(url)
    with Checkpointer(url, memory=1, options=options) as checkpointer:
        state = at(0)
        assert checkpointer.restore(state) is None and (state["weight"] == 0).all()
    train(url, options, 1, 2, 3, memory=1)
    with Checkpointer(url, memory=1, options=options) as checkpointer:
        restored = checkpointer.restore(state)
        assert (
            restored is not None and restored.step == 3 and set(restored.report.bytes_by_source) == {"memory"}
        )


def test_a_trainer_whose_store_is_deleted_under_it_goes_on_in_the_new_one(tmp_path, options):
    url = str(tmp_path / "store")
    with Checkpointer(url, options=options) as checkpointer:
        saving = checkpointer.save(1, at(1))
        assert saving is not None and saving.durable().result(20).step == 1
        shutil.rmtree(url)
        assert checkpointer.restore(at(0)) is None
        saving = checkpointer.save(1, at(1))
        assert saving is not None and saving.durable().result(20).generation == 1
        assert checkpointer.latest() == 1


def test_a_share_that_comes_after_its_snapshot_is_over_is_told_so(config):
    with connect(config) as host:
        saver = Saver(host, "run")
        assert durable_steps(save_alone(saver, 1, share=Share.alone("h0"))) == [1]
        (told,) = save_alone(saver, 1, share=Share.alone("h0"))
        assert isinstance(told, Failed) and "was saved here before" in told.why
        saver.close()


def test_the_newest_trainer_s_settings_count_whatever_its_predecessor_asked_for(tmp_path, options):
    url, first = str(tmp_path / "store"), options
    train(url, first, 1, num=1000)
    keeper = keeper_of(tmp_path)
    more = replace(options, tiers=(Tier(str(tmp_path / "far"), name="far"),))
    saving = train(url, more, 2, num=4 * MIB, memory=1, keep=(LatestN(1),))
    assert saving is not None and saving.tiers == ("store", "far", "memory")
    assert keeper_of(tmp_path) == keeper, "nothing had to be started anew"
    with Checkpointer(url, options=options) as checkpointer:
        assert eventually(lambda: checkpointer.latest() == 2)


def test_a_state_that_grows_gets_a_larger_arena_while_the_training_goes_on(tmp_path, options):
    with Checkpointer(str(tmp_path / "store"), options=options) as checkpointer:
        for step in range(1, 5):
            saving = checkpointer.save(step, at(step, 1000 * 10**step))
            assert saving is not None and saving.durable().result(30).step == step


def test_an_arena_of_a_said_size_stays_and_a_state_that_outgrows_it_only_loses_its_checkpoints(
    tmp_path, options
):
    with Checkpointer(str(tmp_path / "store"), options=replace(options, arena_mib=1)) as checkpointer:
        savings = []
        for step, num in ((1, 100), (2, MIB), (3, 100)):
            savings.append(checkpointer.save(step, at(step, num)))
            checkpointer.wait_captured()
        fates = [saving.durable().exception(20) for saving in savings if saving]
        assert fates[0] is None and fates[2] is None
        assert "raise `Options(arena_mib=)` to at least 4" in str(fates[1])


def test_who_asks_for_something_else_than_a_living_process_is_told_what_differs(tmp_path, config):
    visitor = subprocess.Popen(
        [sys.executable, "-c", VISITOR, config_to_text(config), str(config.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert visitor.stdin is not None and visitor.stdout is not None
    with visitor, visitor.stdin:
        assert visitor.stdout.readline() == b"in\n"
        with connect(config):
            pass
        with pytest.raises(KeeperBusy, match=rf"process {visitor.pid} .*hold is 0 there and 3 here"):
            connect(replace(config, hold=3, start_s=0.5))
        with pytest.raises(KeeperBusy, match=r"another run's \(run is run there and other here\)"):
            connect(replace(config, run="other", start_s=0.5))
    with connect(replace(config, hold=3)):
        pass
    before = keeper_of(tmp_path)
    with connect(replace(config, run="other")):
        assert keeper_of(tmp_path) != before


def test_a_keeper_that_still_writes_to_a_silent_far_tier_serves_the_next_trainer_at_once(
    tmp_path, options, silent
):
    url, quick = str(tmp_path / "store"), replace(options, lease_s=0.2, tiers=(Tier(silent, name="far"),))
    quick = replace(quick, reading=ReadPolicy(patience_s=0.2))
    with Checkpointer(url, options=quick) as checkpointer:
        saving = checkpointer.save(1, at(1))
        assert saving is not None and saving.durable().result(20).step == 1
    keeper = keeper_of(tmp_path)
    time.sleep(1.0)  # several times its lease
    with Checkpointer(url, options=quick) as checkpointer:
        saving = checkpointer.save(2, at(2))
        assert saving is not None and saving.durable().result(10).step == 2
        restored = checkpointer.restore(at(0))
        assert restored is not None and restored.step == 2 and restored.report.unreached == ("far",)
        assert keeper_of(tmp_path) == keeper
    os.kill(keeper, signal.SIGTERM)
    with Checkpointer(url, options=quick) as checkpointer:
        saving = checkpointer.save(3, at(3))
        assert saving is not None and saving.durable().result(15).step == 3
        assert keeper_of(tmp_path) != keeper


def test_a_keeper_whose_starter_is_gone_says_so_in_one_line_and_serves(config):
    reading, writing = os.pipe()
    os.close(reading)
    config.home.mkdir(mode=0o700)
    command = [sys.executable, "-m", "checkpoint.keeper", "--config", config_to_text(config)]
    told = ["--directory", str(config.home), "--ready-fd", str(writing)]
    with open(config.log_path, "wb") as log:
        keeper = subprocess.Popen([*command, *told], stderr=log, pass_fds=(writing,))
    os.close(writing)
    assert eventually(config.socket_path.exists)
    with connect(config) as host:
        assert host.pressure().arena_bytes == MIB and keeper_of(config.home.parent) == keeper.pid
    assert "Traceback" not in config.log_path.read_text()
    keeper.terminate()
    assert keeper.wait(20) == 0


def test_what_another_claims_is_another_store_and_one_that_lost_all_claims_may_be_away(config):
    store = open_store(config.store_url)
    with connect(config) as host:
        assert claim_generation(store, 1, "first")
        saver = Saver(host, "run")
        save_alone(saver, 1, share=Share.alone("h0", 1))
        saver.close()
    first = keeper_of(config.home.parent)
    store.delete("control/generations/000001")
    with connect(config):
        assert keeper_of(config.home.parent) == first
    assert claim_generation(store, 1, "second")
    with connect(config):
        assert keeper_of(config.home.parent) != first
