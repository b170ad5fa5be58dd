"""Nodes that Ray drains: each is told once as news, and can be asked for at any time after. A SIGTERM is a
notice to the worker alone, and not to children that it forked.
"""

import os
import signal
from collections.abc import Mapping

import pytest

from elastic.runtime import preemption
from elastic.runtime.placement import HOST_LENGTH
from elastic.runtime.preemption import Draining, heed_sigterm

NODE = "a" * 2 * HOST_LENGTH
HOST = NODE[:HOST_LENGTH]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "LOOK_EVERY_S", 0.0)


def test_a_node_is_news_once_and_its_notice_is_known_to_whoever_comes_later() -> None:
    drained: dict[str, int] = {}
    draining = Draining(lambda: drained)
    assert (draining.news(), draining.notice(HOST)) == ({}, None)
    drained[NODE] = 0
    assert draining.news() == {HOST: "Ray drains its node"}
    assert draining.news() == {}
    assert draining.notice(HOST) == "Ray drains its node"
    assert draining.hosts == {HOST}


def test_what_ray_does_not_answer_changes_nothing_that_was_known() -> None:
    answers: list[Mapping[str, int]] = [{NODE: 0}]

    def ask() -> Mapping[str, int]:
        if not answers:
            raise OSError("the control store is away")
        return answers.pop()

    draining = Draining(ask)
    assert list(draining.news()) == [HOST]
    assert draining.news() == {}
    assert draining.notice(HOST) is not None


def test_a_sigterm_tells_a_worker_and_ends_a_child_that_it_forked() -> None:
    told: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    heed_sigterm(lambda: told.append(os.getpid()))
    reader, writer = os.pipe()
    try:
        if not (child := os.fork()):
            os.write(writer, b"!")  # what comes sooner after a fork is forgotten
            while True:
                signal.pause()
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(reader)
        os.close(writer)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert told == [os.getpid()]
