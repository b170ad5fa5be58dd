"""Claims: one driver fences another; a worker that saved alone fences none."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from checkpoint import RetryPolicy, StoreUnavailable, newest_generation, open_store
from elastic.errors import Fenced
from elastic.runtime import claims
from elastic.runtime.claims import Claims, claim_alone


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}")


def test_a_driver_that_was_superseded_is_fenced_as_it_claims_and_as_it_makes_sure(store):
    old, new = Claims(store, "run"), Claims(store, "run")
    assert old.claim(1)
    assert old.claim(1), "a claim that was written although an error was reported is found again"
    old.confirm()
    assert new.claim(2)
    with pytest.raises(Fenced, match="taken over by another driver"):
        old.confirm()
    with pytest.raises(Fenced, match="generation 2 of run run belongs to another driver"):
        old.claim(2)
    new.confirm()


def test_who_takes_a_run_up_fences_the_driver_before_it_has_formed_a_world(store):
    old = Claims(store, "run")
    assert old.claim(1)
    assert claim_alone(store, 2, "w0")
    new = Claims(store, "run")
    new.take_over()
    assert new.newest == 3
    with pytest.raises(Fenced):
        old.confirm()


def test_a_worker_that_saves_alone_takes_no_drivers_place(store):
    driver, successor = Claims(store, "run"), Claims(store, "run")
    assert driver.claim(1)
    assert claim_alone(store, 2, "w0")
    assert not claim_alone(store, 2, "w1"), "one of them saves"
    driver.confirm()
    assert not driver.claim(2)
    assert driver.claim(3)
    assert claim_alone(store, 4, "w1")
    assert successor.claim(newest_generation(store) + 1)
    with pytest.raises(Fenced):
        driver.confirm()


class Failing:
    """A store that is away; it says so once it `is_asked`, and gives each request a number."""

    def __init__(self, store: Any) -> None:
        self._store, self.is_away = store, False
        self.num_asked = 0
        self.is_asked = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*arguments: Any) -> Any:
            if not self.is_away:
                return getattr(self._store, name)(*arguments)
            self.num_asked += 1
            self.is_asked.set()
            raise StoreUnavailable("connection refused")

        return request


def test_a_claim_that_is_waited_for_no_longer_is_not_made_once_the_store_is_back(store, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", RetryPolicy(20.0, 0.5, 0.5))
    away: Any = Failing(store)
    driver = Claims(away, "run")
    away.is_away = True
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(driver.take_over)
        assert away.is_asked.wait(20.0)
        driver.give_up()
        away.is_away = False
        with pytest.raises((StoreUnavailable, Fenced)):
            asking.result(timeout=20.0)
    for claim in (lambda: driver.claim(1), driver.confirm):
        with pytest.raises(Fenced, match="given run run up"):
            claim()
    assert newest_generation(store) == 0
