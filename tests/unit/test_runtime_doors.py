"""Doors: who lives answers, who is gone refuses, and who is cut off does neither."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from elastic.runtime.doors import Door, find_closed
from elastic.runtime.sockets import Address

LOOPBACK = "127.0.0.1"


@pytest.fixture
def silent() -> Iterator[Address]:
    """Give an address that answers nobody: it has a full queue."""
    with ExitStack() as opened:
        server = opened.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(4):
            one = opened.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield server.getsockname()


def gone() -> Address:
    """Return where somebody listened once."""
    with socket.create_server((LOOPBACK, 0)) as server:
        host, port = server.getsockname()
        return host, port


def test_whose_door_refuses_or_does_not_answer_is_out_of_reach(silent):
    doors = {0: Door(LOOPBACK), 3: Door(LOOPBACK)}
    addresses = {rank: door.address for rank, door in doors.items()}
    assert find_closed(addresses, lambda: True) == ()
    assert find_closed({**addresses, 2: silent, 1: gone()}, lambda: True) == (1, 2)
    assert find_closed({}, lambda: True) == ()


def test_who_looks_for_closed_doors_stops_as_soon_as_nobody_wants_to_know(silent):
    asked = iter([True, True, False])
    assert find_closed({1: silent}, lambda: next(asked), answer_s=600.0) is None


def test_more_doors_than_are_tried_at_once_are_tried_in_turn(monkeypatch):
    monkeypatch.setattr("elastic.runtime.doors._AT_ONCE", 2)
    door = Door(LOOPBACK)
    doors = {rank: gone() if rank in (1, 4) else door.address for rank in range(6)}
    assert find_closed(doors, lambda: True) == (1, 4)


def test_a_door_at_which_many_have_knocked_is_cleared_for_others():
    door = Door(LOOPBACK)
    door._socket.listen(0)
    for _ in range(4):
        find_closed({0: door.address}, lambda: True, answer_s=0.05)
    assert find_closed({0: door.address}, lambda: True, answer_s=0.05) == (0,)
    door.clear()
    assert find_closed({0: door.address}, lambda: True) == ()
