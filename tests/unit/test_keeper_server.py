"""A keeper's server in this very process, over a store that hangs: who comes while it is ending is served."""

import socket
import threading
import time
from dataclasses import replace

import pytest

from checkpoint import KeeperConfig, Saver, Share, connect, load
from checkpoint.keeper.home import make_private
from checkpoint.keeper.server import Server
from checkpoint.keeper.settings import config_to_text, parse_config
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, durable_steps, same_bits, save_alone, small_state

SHARE = Share.alone("h0")


class Hanging(MemoryStore):
    """A store whose writes hang until it is let go."""

    def __init__(self):
        super().__init__("hanging")
        self.go, self.asked = threading.Event(), threading.Event()

    def put_new(self, key, data):
        self.asked.set()
        assert self.go.wait(20)
        super().put_new(key, data)


@pytest.fixture
def config(tmp_path):
    tmp_path.chmod(0o700)
    return KeeperConfig(
        "run", "h0", str(tmp_path), arena_bytes=MIB, lease_s=0.1, directory=tmp_path / "keeper"
    )


@pytest.fixture
def store():
    store = Hanging()
    yield store
    store.go.set()


@pytest.fixture
def server(config, store):
    make_private(config.home)
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
