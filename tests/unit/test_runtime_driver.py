"""A driver whose store is away: what needs a claim waits for it, and the run is kept alive meanwhile.

The cluster is a stand-in that writes down what it is told: native Ray never runs in the process of the tests.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

import elastic
from checkpoint import Retrying, RetryPolicy, Store, StoreUnavailable, open_store
from elastic.control.instructions import FormWorld, KillMember, Manner, ReleaseMember, Status
from elastic.errors import Fenced
from elastic.runtime import claims, driver
from elastic.runtime.claims import Claims
from elastic.runtime.driver import Driver
from elastic.runtime.journal import Journal
from elastic.runtime.lifeline import Anchor
from elastic.runtime.world import Endpoint
from tests.orders import unasked_order

WAIT_S = 20.0
FORM = FormWorld(1, ("w0", "w1"), ("h", "h"), Manner.AT_BOUNDARY, "all are there")


class Told:
    """A cluster that only writes down what it is told."""

    anchor = Anchor("127.0.0.1", 1, "")
    address = "127.0.0.1"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.num_renewed = 0
        self.num_revived = 0
        self.is_renewed_often = threading.Event()

    def tell(self, member: str, method: str, *_: object) -> None:
        self.told.append(f"{method} {member}")

    def end_silent(self, member: str) -> None:
        self.told.append(f"kill {member}")

    def kill(self, member: str) -> None:
        self.told.append(f"release {member}")

    def find(self) -> list[str]:
        return []

    def start(self, member: str) -> None:
        self.told.append(f"start {member}")

    def renew(self) -> None:
        self.num_renewed += 1
        if self.num_renewed == 3:
            self.is_renewed_often.set()

    def revive(self) -> None:
        self.num_revived += 1


class Away:
    """A store whose requests of claims hang until it `is_back`, or fail at first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_back = threading.Event()
        self.num_failures = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*arguments: Any) -> Any:
            assert self.is_back.wait(WAIT_S)
            if self.num_failures:
                self.num_failures -= 1
                raise StoreUnavailable("connection refused")
            return getattr(self._store, name)(*arguments)

        return request


@pytest.fixture
def order(tmp_path) -> elastic.TrainOrder:
    (tmp_path / "run").mkdir()
    return unasked_order(tmp_path / "run")


@pytest.fixture
def away(order) -> Away:
    return Away(open_store(order.checkpoint.store_url))


@pytest.fixture
def driving(order, away, monkeypatch) -> Iterator[Driver]:
    monkeypatch.setattr(driver, "open_store", lambda url: away)
    monkeypatch.setattr(claims, "PATIENCE", RetryPolicy(WAIT_S, 0.01, 0.01))
    away.is_back.set()
    with Journal(order.run_dir) as journal:
        one = Driver(order, journal, lambda notice: None)
        one._cluster, one._endpoint = cast(Any, Told()), Endpoint("127.0.0.1", 1)
        yield one
    away.is_back.set()


def test_while_the_store_hangs_the_run_is_kept_alive_and_nothing_that_needs_a_claim_is_done(driving, away):
    cluster: Told = driving._cluster
    away.is_back.clear()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(driving._act, [KillMember("w2", "hung"), FORM, ReleaseMember("w3", "spare")])
        assert cluster.is_renewed_often.wait(WAIT_S)
        assert cluster.told == []
        assert cluster.num_revived == 0, "another Ray is begun between two rounds, not in the midst of one"
        away.is_back.set()
        acting.result(timeout=WAIT_S)
    assert cluster.told == ["kill w2", "form w0", "form w1", "release w3"]


def test_a_store_that_refuses_for_a_while_is_asked_again(driving, away):
    away.num_failures = 3
    driving._act([FORM])
    assert driving._cluster.told == ["form w0", "form w1"]


def test_a_store_that_stays_away_ends_the_driver_with_its_error(driving, away):
    driving._claims._store = Retrying(away, RetryPolicy(0.05, 0.01, 0.01))
    away.num_failures = 1 << 30
    with pytest.raises(StoreUnavailable, match="connection refused"):
        driving._act([FORM])
    assert driving._cluster.told == []


def test_a_driver_that_was_superseded_while_its_store_was_away_does_nothing_more(driving, away, order):
    cluster: Told = driving._cluster
    driving._act([FORM])
    done, cluster.told = cluster.told, []
    away.is_back.clear()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(driving._act, [KillMember("w1", "hung")])
        assert cluster.is_renewed_often.wait(WAIT_S)
        Claims(open_store(order.checkpoint.store_url), order.run).take_over()
        away.is_back.set()
        with pytest.raises(Fenced, match="taken over"):
            acting.result(timeout=WAIT_S)
    assert (done, cluster.told) == (["form w0", "form w1"], [])


def test_a_stop_that_waits_for_the_store_too_long_leaves_the_workers_to_themselves(
    driving, away, monkeypatch
):
    monkeypatch.setattr(driver, "STOP_LIMIT_S", 0.0)
    driving._controller.generation = 1  # it begins with a claim
    away.is_back.clear()
    end = driving._loop([signal.SIGTERM])
    assert end.status is Status.STOPPED
    assert "the workers go on" in end.reason
    assert driving._is_late
    assert driving._cluster.told == []
    with pytest.raises(Fenced, match="given run run up"):
        driving._claims.confirm()
