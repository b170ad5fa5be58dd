"""Lifelines: the driver hears of a member's end from its socket, once, and of nobody else's."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from queue import Empty, SimpleQueue

import pytest

from elastic.runtime.lifeline import Lifeline, Lifelines

LOOPBACK = "127.0.0.1"
WAIT_S = 10.0
HOLDER = """
import os, signal, sys
from elastic.runtime.lifeline import Anchor, Lifeline
line = Lifeline(sys.argv[1])
line.hold(Anchor("127.0.0.1", int(sys.argv[2]), sys.argv[3]))
child = os.fork() if "fork" in sys.argv else -1
if child:
    print(child, flush=True)
signal.pause()
"""


@pytest.fixture
def lost():
    return SimpleQueue()


@pytest.fixture
def lifelines(lost):
    lines = Lifelines(LOOPBACK, lost.put)
    yield lines
    lines.close()


@pytest.mark.parametrize("then", ["", "fork"])
def test_a_sigkilled_process_is_told_lost_by_its_name_though_a_child_of_its_lives_on(lifelines, lost, then):
    anchor = lifelines.anchor
    arguments = [sys.executable, "-c", HOLDER, "w3", str(anchor.port), anchor.token, then]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(Empty):
            lost.get(timeout=0.05)
        process.send_signal(signal.SIGKILL)
        try:
            assert lost.get(timeout=WAIT_S) == "w3"
        finally:
            if child > 0:
                os.kill(child, signal.SIGKILL)


def test_a_stranger_without_the_word_can_call_nobody_lost(lifelines, lost):
    stranger = Lifeline("w0")
    stranger.hold(replace(lifelines.anchor, token="guess"))
    stranger.let_go()
    with socket.create_connection((LOOPBACK, lifelines.anchor.port)) as babbler:
        babbler.sendall(b"x" * 100_000)
    friend = Lifeline("w1")
    friend.hold(lifelines.anchor)
    friend.let_go()
    assert lost.get(timeout=WAIT_S) == "w1"
    assert lost.empty()


def test_a_member_that_changes_its_driver_is_not_lost_to_the_old_one(lost):
    news: SimpleQueue[str] = SimpleQueue()
    old, new = Lifelines(LOOPBACK, lost.put), Lifelines(LOOPBACK, news.put)
    line = Lifeline("w0")
    line.hold(old.anchor)
    line.hold(new.anchor)
    other = Lifeline("w1")
    other.hold(old.anchor)
    other.let_go()
    assert lost.get(timeout=WAIT_S) == "w1"
    assert lost.empty(), "w0 said that it moved, long before w1 was gone"
    old.close()
    new.close()
    line.let_go()
    assert news.empty(), "a driver that goes calls nobody lost"


def test_a_driver_that_is_gone_is_no_error_for_a_member():
    lifelines = Lifelines(LOOPBACK, lambda member: None)
    lifelines.close()
    Lifeline("w0").hold(lifelines.anchor)
