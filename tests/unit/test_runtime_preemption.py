"""Nodes that Ray drains: each is told once as news, and can be asked for at any time after."""

from collections.abc import Mapping

import pytest

from elastic.runtime import preemption
from elastic.runtime.placement import HOST_LENGTH
from elastic.runtime.preemption import Draining

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
