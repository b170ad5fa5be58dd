"""Claims: one driver fences another; a worker that saved alone fences none."""

import pytest

from checkpoint import newest_generation, open_store
from elastic.errors import Fenced
from elastic.runtime.claims import Claims, claim_alone


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}")


def test_a_driver_that_was_superseded_is_fenced_as_it_claims_and_as_it_makes_sure(store):
    old, new = Claims(store, "run"), Claims(store, "run")
    assert old.claim(1)
    assert old.claim(1), "a claim that was written although an error was reported is found again"
    old.confirm(1)
    assert new.claim(2)
    with pytest.raises(Fenced, match="taken over by another driver"):
        old.confirm(1)
    with pytest.raises(Fenced, match="generation 2 of run run belongs to another driver"):
        old.claim(2)
    new.confirm(2)


def test_a_worker_that_saves_alone_takes_no_drivers_place(store):
    driver, successor = Claims(store, "run"), Claims(store, "run")
    assert driver.claim(1)
    assert claim_alone(store, 2, "w0")
    assert not claim_alone(store, 2, "w1"), "one of them saves"
    driver.confirm(1)
    assert not driver.claim(2)
    assert driver.claim(3)
    assert claim_alone(store, 4, "w1")
    assert successor.claim(newest_generation(store) + 1)
    with pytest.raises(Fenced):
        driver.confirm(3)
