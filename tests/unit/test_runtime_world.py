"""Worlds of two members: a peer that comes late, a late cut, a device that does not let go, no connection,
and a member that dies while children of its live on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from elastic.runtime import world as worlds
from elastic.runtime.lane import ThreadLane
from elastic.runtime.world import Endpoint, Former, Place, Unconnected, World, open_rendezvous
from elastic.training.handover import Parcel, accept, hand_over
from elastic.training.ports import Broken

LOOPBACK, CPU = "127.0.0.1", torch.device("cpu")
WAIT_S, CONNECT_S = 20.0, 1.0
PARENT = """
import os, signal, sys, time
import torch
from elastic.runtime.world import Endpoint, Former, Place
former = Former("127.0.0.1", torch.device("cpu"))
place = Place(1, 1, ("h", "h"), "127.0.0.1")
world = former.form(place, Endpoint("127.0.0.1", int(sys.argv[1])), lambda: True, time.sleep)
tensor = torch.ones(1)
world.all_reduce(tensor, "sum")
if sys.argv[2] == "fork":
    child = os.fork()
else:  # a program that closes nothing of what it was given
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    child = os.posix_spawn(sys.executable, command, os.environ)
if child:
    world.all_reduce(tensor, "sum")
    print(child, flush=True)
signal.pause()
"""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    store, endpoint = open_rendezvous(LOOPBACK)
    yield endpoint
    del store


@pytest.fixture
def ranks() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def formed(ranks: ThreadPoolExecutor, formers: list[Former], endpoint: Endpoint, generation: int) -> Any:
    places = [Place(generation, rank, ("h", "h"), LOOPBACK) for rank in range(2)]
    return list(
        ranks.map(
            lambda former, place: former.form(place, endpoint, lambda: True, time.sleep), formers, places
        )
    )


@pytest.fixture
def hasty(ranks, endpoint, monkeypatch) -> Iterator[tuple[World, World]]:
    """Give a world whose members connected within a second, or not at all."""
    monkeypatch.setattr(worlds, "CONNECT_TIMEOUT", timedelta(seconds=CONNECT_S))
    pair = formed(ranks, [Former(LOOPBACK, CPU), Former(LOOPBACK, CPU)], endpoint, 1)
    yield pair
    for each in pair:
        each.leave()


def swapped(world: World) -> float:
    peer, received = 1 - world.rank, torch.zeros(2)
    tensors = [None if rank == world.rank else torch.ones(2) for rank in range(2)]
    world.exchange(tensors, [received if rank == peer else None for rank in range(2)])
    return float(received.sum())


def received(world: World) -> float:
    tensor = torch.zeros(2)
    world.receive(tensor, 1 - world.rank)
    return float(tensor.sum())


def sent(world: World) -> None:
    world.send(torch.ones(2), 1 - world.rank)


def accepted(world: World) -> Any:
    return accept(world, 1 - world.rank, CPU).state


def handed(world: World) -> None:
    hand_over(world, [1 - world.rank], Parcel({"step": 7}, "fresh"), CPU)


def total(ranks: ThreadPoolExecutor, pair: list[World]) -> list[float]:
    def reduce(world: World) -> float:
        tensor = torch.ones(3)
        world.all_reduce(tensor, "sum")
        return float(tensor[0])

    return list(ranks.map(reduce, pair))


def test_a_late_cut_of_a_world_that_was_left_does_not_break_the_next_one(ranks, endpoint):
    formers = [Former(LOOPBACK, CPU), Former(LOOPBACK, CPU)]
    older = formed(ranks, formers, endpoint, 1)
    assert total(ranks, older) == [2.0, 2.0]
    for each in older:
        each.leave()
    newer = formed(ranks, formers, endpoint, 2)
    for each in older:
        each.cut()  # by a driver's call that came late
    assert total(ranks, newer) == [2.0, 2.0]
    newer[0].cut()
    with pytest.raises(Broken):
        total(ranks, newer)
    for each in newer:
        each.leave()


@pytest.mark.parametrize(
    ("first", "late", "expected"),
    [(swapped, swapped, 2.0), (received, sent, 2.0), (sent, received, None), (accepted, handed, {"step": 7})],
)
def test_a_peer_is_waited_for_longer_than_a_connection(ranks, hasty, first, late, expected):
    waiting = ranks.submit(first, hasty[0])
    wait([waiting], timeout=1.5 * CONNECT_S)  # a send of little is done by now, all else waits
    late(hasty[1])
    assert waiting.result(timeout=WAIT_S) == expected


@pytest.mark.parametrize("cutter", [0, 1])
def test_who_waits_for_a_late_peer_is_freed_once_either_side_cuts_the_world(ranks, hasty, cutter):
    waiting = ranks.submit(received, hasty[0])
    assert wait([waiting], timeout=1.5 * CONNECT_S).not_done
    hasty[cutter].cut()
    with pytest.raises(Broken, match=r"losed|reset"):
        waiting.result(timeout=WAIT_S)


class Stuck:
    """A communicator on a device that has died: its abort waits for it."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def abort(self) -> None:
        self.may_end.wait(60)


def test_a_communicator_that_does_not_abort_holds_nobody_up_and_frees_the_peers(ranks, endpoint, monkeypatch):
    monkeypatch.setattr(worlds, "ABORT_TIMEOUT_S", 0.2)
    pair, stuck = formed(ranks, [Former(LOOPBACK, CPU), Former(LOOPBACK, CPU)], endpoint, 1), Stuck()
    place = Place(1, 0, ("h", "h"), LOOPBACK)
    first = World(place, {**pair[0]._groups, "cuda": stuck}, pair[0]._listeners, ThreadLane())
    waiting = ranks.submit(pair[1].all_reduce, torch.ones(1), "sum")
    with pytest.raises(TimeoutError, match=r"of world 1 has not aborted within 0\.2 s"):
        first.leave()
    with pytest.raises(Broken):
        waiting.result(timeout=20)
    with pytest.raises(Broken, match="has left"):
        first.all_reduce(torch.ones(1), "sum")
    stuck.may_end.set()
    for each in pair:
        each.leave()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_member_that_could_not_connect_says_whose_door_does_not_answer(endpoint, monkeypatch, is_there):
    monkeypatch.setattr(worlds, "CONNECT_TIMEOUT", timedelta(seconds=0.2))
    store = TCPStore(endpoint.host, endpoint.port, is_master=False)
    with socket.create_server((LOOPBACK, 0)) as door:
        PrefixStore("generation-1", store).set("listens-1", json.dumps([[], door.getsockname()]))
        if not is_there:
            door.close()
        with pytest.raises(Unconnected, match="could not form") as told:
            Former(LOOPBACK, CPU).form(Place(1, 0, ("h", "h"), LOOPBACK), endpoint, lambda: True, time.sleep)
    assert told.value.unreachable == (() if is_there else (1,))


@pytest.mark.parametrize("how", ["fork", "exec"])
def test_a_sigkilled_member_is_gone_for_its_peers_though_a_child_of_its_lives_on(endpoint, how):
    former, arguments = Former(LOOPBACK, CPU), [sys.executable, "-c", PARENT, str(endpoint.port), how]
    with (
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent,
        ThreadPoolExecutor(1) as one,
    ):
        world = former.form(Place(1, 0, ("h", "h"), LOOPBACK), endpoint, lambda: True, time.sleep)
        for _ in range(2):  # the second once there is a child, which takes nothing from its parent
            world.all_reduce(torch.ones(1), "sum")
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        waiting = one.submit(world.all_reduce, torch.ones(1), "sum")
        parent.send_signal(signal.SIGKILL)
        try:
            with pytest.raises(Broken):
                waiting.result(timeout=WAIT_S)
            assert not _sockets_of(child)
        finally:
            os.kill(child, signal.SIGKILL)
            world.leave()


def _sockets_of(pid: int) -> list[str]:
    files = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    return [file for file in files if os.readlink(file).startswith("socket:")]
