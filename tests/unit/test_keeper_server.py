"""A keeper's server in this very process, over a store that hangs: who comes while it is ending is served."""

import os
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoint import (
    Checkpointer,
    Conflict,
    KeeperConfig,
    Options,
    ReadPolicy,
    Restoration,
    Saver,
    Saving,
    Share,
    connect,
    load,
)
from checkpoint.keeper.home import hold_life_lock, make_private
from checkpoint.keeper.messages import receive, receive_with_fd, send
from checkpoint.keeper.server import Server
from checkpoint.keeper.settings import config_to_text, parse_config
from checkpoint.store.local import LocalStore
from tests.fault.checkpoint_worlds import MIB, durable_steps, same_bits, save_alone, small_state

SHARE = Share.alone("h0")


class Hanging(LocalStore):
    """A store whose writes hang until it is let go."""

    def __init__(self, root):
        super().__init__(root)
        self.go, self.asked = threading.Event(), threading.Event()

    def put_new(self, key, data):
        self.asked.set()
        assert self.go.wait(20)
        super().put_new(key, data)


@pytest.fixture
def config(tmp_path):
    tmp_path.chmod(0o700)
    return KeeperConfig(
        "run", "h0", str(tmp_path / "store"), arena_bytes=MIB, lease_s=0.1, directory=tmp_path / "keeper"
    )


@pytest.fixture
def store(tmp_path):
    store = Hanging(tmp_path / "store")
    yield store
    store.go.set()


@pytest.fixture
def server(config, store):
    make_private(config.home)
    life_lock = hold_life_lock(config)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(config.socket_path))
    listener.listen()
    told = parse_config(config_to_text(replace(config, lease_s=20.0)), config.home)
    server = Server(told, store, listener)  # a client says less later
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(server.serve()))
    thread.start()
    yield server
    store.go.set()
    thread.join(20)
    os.close(life_lock)
    assert ended == [True]


def test_a_keeper_that_was_told_to_end_goes_on_for_who_comes_while_its_store_hangs(config, store, server):
    with connect(config) as host:
        saver = Saver(host, "run")
        saver.save(1, small_state(1), SHARE, {})
        saver.wait_captured()
        assert store.asked.wait(20)
        server.stop()
        with connect(config) as second:
            successor = Saver(second, "run")
            successor.save(2, small_state(2), SHARE, {})
            successor.wait_captured()
            store.go.set()
            assert saver.drain(20) and 1 in durable_steps(saver.outcomes())
            assert successor.drain(20) and durable_steps(successor.outcomes()) == [1, 2]
            successor.close()
        saver.close()
    assert same_bits(load(store).state, small_state(2))


def test_a_keeper_whose_lease_is_over_while_its_store_hangs_is_joined_and_loses_nothing(
    config, store, server
):
    with connect(config) as host:
        saver = Saver(host, "run")
        saver.save(1, small_state(1), SHARE, {})
        saver.wait_captured()
        saver.close()
    assert store.asked.wait(20)
    time.sleep(5 * config.lease_s)
    with connect(config) as second:
        successor = Saver(second, "run")
        store.go.set()
        assert 2 in durable_steps(save_alone(successor, 2, share=SHARE))
        successor.close()
    assert same_bits(load(store, 1).state, small_state(1))


def test_who_restores_while_the_keeper_writes_waits_for_what_a_dead_trainer_captured(config, store, server):
    with connect(config) as host:
        saver = Saver(host, "run")
        for step in (1, 2):
            saver.save(step, small_state(step), SHARE, {})
            saver.wait_captured()
        assert store.asked.wait(20)
        saver.close()
    with connect(config) as second:
        assert second.settle(-1, 0.05, patience_s=20) == (1, 2)
        assert second.settle(1, 20, patience_s=0.05) == (2,)
        assert second.settle(2, 20, patience_s=20) == ()
        threading.Timer(0.1, store.go.set).start()
        assert second.settle(-1, 20, patience_s=20) == ()
    assert same_bits(load(store).state, small_state(2))


@pytest.mark.parametrize("step", [None, 1])
def test_a_training_that_restarts_while_its_last_step_is_written_goes_on_from_that_one(
    config, store, server, step
):
    options = Options(directory=config.directory, host="h0", lease_s=0.1, arena_mib=1)
    state = {"weight": torch.full((100,), 1.0)}
    first = Checkpointer(config.store_url, options=options)  # and never closed, as if it had died
    assert first.save(1, state) is not None
    first.wait_captured()
    assert store.asked.wait(20)
    with Checkpointer(config.store_url, options=options) as second:
        threading.Timer(0.3, store.go.set).start()
        restored = second.restore(state, step)
        assert restored is not None and restored.step == 1
        saving = second.save(2, state)
        assert saving is not None and saving.durable().result(20).step == 2
    first.close()


def test_a_restore_waits_for_what_hangs_no_longer_than_it_may_and_says_what_it_does_without(
    config, store, server, caplog
):
    options = Options(directory=config.directory, host="h0", lease_s=0.1, arena_mib=1, flush_s=0.1)
    state = {"weight": torch.full((100,), 1.0)}
    first = Checkpointer(config.store_url, options=options)
    first.save(1, state)
    with Checkpointer(config.store_url, options=options) as second:
        assert second.restore(state) is None
    assert "step 1 captured and not durable" in caplog.text
    store.go.set()
    first.close()


def saved(checkpointer: Checkpointer, step: int, state: dict[str, Any]) -> Saving:
    saving = checkpointer.save(step, state)
    assert saving is not None
    return saving


def restored_by(checkpointer: Checkpointer, state: dict[str, Any], step: int | None = None) -> Restoration:
    restored = checkpointer.restore(state, step)
    assert restored is not None
    return restored


def test_a_restore_waits_for_a_store_that_hangs_no_longer_than_a_reader_and_its_report_names_the_step(
    config, store, server
):
    reading = ReadPolicy(empty_patience_s=0.1)
    options = Options(directory=config.directory, host="h0", lease_s=0.1, arena_mib=1, reading=reading)
    state = {"weight": torch.full((100,), 1.0)}
    store.go.set()
    first = Checkpointer(config.store_url, options=options)
    saved(first, 1, state).durable().result(20)
    store.go.clear()
    late = saved(first, 2, state)
    first.wait_captured()
    with Checkpointer(config.store_url, options=options) as second:
        restored = restored_by(second, state)  # `flush_s` is 600 s
        assert restored.step == 1 and any("step 2" in note for note in restored.notes)
        assert any("step 2" in note for note in restored_by(second, state, step=1).notes)
        store.go.set()
        assert late.durable().result(20).step == restored_by(second, state).step == 2
    first.close()


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_first_save_that_a_predecessor_s_unfinished_step_would_meet_is_refused_at_once(
    config, store, server, is_committed
):
    options = Options(directory=config.directory, host="h0", lease_s=0.1, arena_mib=1)
    state = {"weight": torch.full((100,), 1.0)}
    first = Checkpointer(config.store_url, options=options)  # and never closed, as if it had died
    saving = saved(first, 2, state)
    first.wait_captured()
    assert store.asked.wait(20)
    with Checkpointer(config.store_url, options=options) as second:
        if is_committed:  # when the next one saves; it was not when that one was made
            store.go.set()
            saving.durable().result(20)
        for step in (1, 2):
            with pytest.raises(Conflict, match=r"step 2\b.*restore\(state\) first"):
                second.save(step, state)
        store.go.set()
        assert restored_by(second, state).step == 2
        assert saved(second, 3, state).durable().result(20).step == 3
    assert saving.durable().result(20).step == 2
    first.close()


def test_a_first_save_beyond_a_predecessor_s_unfinished_step_goes_on_and_nothing_is_lost(
    config, store, server
):
    options = Options(directory=config.directory, host="h0", lease_s=0.1, arena_mib=1)
    state = {"weight": torch.full((100,), 1.0)}
    first = Checkpointer(config.store_url, options=options)
    saving = saved(first, 2, state)
    first.wait_captured()
    assert store.asked.wait(20)
    with Checkpointer(config.store_url, options=options) as second:
        later = saved(second, 3, state)
        store.go.set()
        assert (saving.durable().result(20).step, later.durable().result(20).step) == (2, 3)
    first.close()


def said_to(config, *messages):
    """Say something to a keeper as no client of ours does; return what it answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(20)
        channel.connect(str(config.socket_path))
        send(channel, messages[0])
        told = [receive_with_fd(channel)[0]]
        for message in messages[1:]:
            send(channel, message)
            told.append(receive(channel))
        return told


def test_a_keeper_refuses_what_makes_no_sense_says_why_and_serves_on(config, store, server):
    (told,) = said_to(config, {"hello": "{}"})
    assert told["kind"] == "Mismatch" and "no keeper's" in told["error"]
    hello, ticket = {"hello": config_to_text(config)}, ["run", 1, 1, 0]
    _, *told = said_to(
        config,
        hello,
        {"verb": "open", "id": 1, "ticket": ticket, "plan": {"handling": {"codec": "raw"}}},
        {"verb": "open", "id": 2, "ticket": ["run"], "plan": {}},
        {"verb": "settle", "id": 3},
        {"id": 4},
        {"verb": "pressure", "id": 5},
    )
    assert [one["id"] for one in told] == [1, 2, 3, 4, 5]
    assert all("makes no sense" in one["error"] for one in told[:4]) and "pressure" in told[4]
    store.go.set()
    with connect(config) as host:
        saver = Saver(host, "run")
        assert durable_steps(save_alone(saver, 1, share=SHARE)) == [1]
        saver.close()
