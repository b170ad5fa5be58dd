"""The way to the driver's rendezvous store: it may be gone, hang, come late, or be wanted no more."""

import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from elastic.runtime import reach as reaching
from elastic.runtime.reach import freed, reach
from elastic.runtime.sockets import Address
from elastic.runtime.world import Endpoint, Former, Place, open_rendezvous
from elastic.training.ports import Broken

LOOPBACK, WAIT_S = "127.0.0.1", 20.0
PLACE = Place(1, 0, ("h", "h"), LOOPBACK)
DRIVER = """
import signal
from elastic.runtime.world import open_rendezvous
store, endpoint = open_rendezvous("127.0.0.1")
print(endpoint.port, flush=True)
signal.pause()
"""


@pytest.fixture
def gone() -> Address:
    """Give where a driver's store was once."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return LOOPBACK, int(server.getsockname()[1])


@pytest.fixture
def former() -> Former:
    return Former(LOOPBACK, torch.device("cpu"))


def test_a_world_whose_driver_is_dead_is_given_up_once_a_newer_one_was_ordered(gone, former):
    slept: list[float] = []
    with pytest.raises(Broken, match="not wanted any more"):
        former.form(PLACE, Endpoint(*gone), lambda: not slept, slept.append)


def test_a_world_whose_driver_connects_and_hangs_is_given_up_once_a_newer_one_was_ordered(former):
    is_old = threading.Event()
    with socket.create_server((LOOPBACK, 0)) as mute, ThreadPoolExecutor(1) as one:
        mute.settimeout(WAIT_S)
        endpoint = Endpoint(LOOPBACK, mute.getsockname()[1])
        forming = one.submit(former.form, PLACE, endpoint, lambda: not is_old.is_set(), time.sleep)
        connections = [mute.accept()[0] for _ in range(2)]  # who knocked, and torch's client
        is_old.set()
        with pytest.raises(Broken, match="not wanted any more"):
            forming.result(timeout=WAIT_S)
        for each in connections:
            each.close()


def test_a_world_whose_driver_hangs_as_its_members_meet_is_given_up_once_a_newer_one_was_ordered(former):
    is_old = threading.Event()
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        endpoint = Endpoint(LOOPBACK, int(driver.stdout.readline()))

        def hang(_: float) -> None:
            driver.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + WAIT_S
            while Path(f"/proc/{driver.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
                assert time.monotonic() < deadline
            is_old.set()  # the store is asked once more before this is looked at

        try:
            with pytest.raises(Broken, match="could not form"):
                former.form(PLACE, endpoint, lambda: not is_old.is_set(), hang)
        finally:
            driver.kill()


def test_a_store_that_comes_late_is_reached(gone):
    (host, port), opened = gone, list[TCPStore]()

    def open_late(_: float) -> None:
        if not opened:
            listener = socket.create_server(gone, backlog=16).detach()
            opened.append(
                TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener)
            )

    reach(gone, lambda: True, open_late).set("a", "b")
    assert opened[0].get("a") == b"b"


def test_a_store_that_nobody_opens_is_given_up_in_time(gone, monkeypatch):
    monkeypatch.setattr(reaching, "REACH_S", 0.1)
    with pytest.raises(ConnectionError, match=r"was not reached in 0\.1 s: nothing answers there"):
        reach(gone, lambda: True, time.sleep)


def test_who_sees_at_once_that_a_store_is_not_wanted_keeps_the_connection(monkeypatch):
    monkeypatch.setattr(reaching, "GRACE_S", WAIT_S)
    store, endpoint = open_rendezvous(LOOPBACK)
    address, asked = (endpoint.host, endpoint.port), threading.Event()
    mine = reach(address, lambda: True, time.sleep)

    def is_wanted() -> bool:
        asked.set()
        return False

    with freed(address, is_wanted):
        assert asked.wait(WAIT_S)
    mine.set("a", "b")
    assert store.get("a") == b"b"
