"""A keeper knows its store by who claimed the newest generation that it worked for."""

import time

import pytest

from checkpoint.engine.generations import claim_generation
from checkpoint.keeper.lineage import Lineage
from checkpoint.store.memory import MemoryStore
from tests.wrapped_stores import Faulty, Lost, Metered


@pytest.fixture
def store():
    store = MemoryStore("lineage")
    assert claim_generation(store, 1, "first") and claim_generation(store, 2, "first")
    return store


def knowing(store, generation: int, num_reads: int = 1) -> Lineage:
    """A lineage that has found out about a generation."""
    metered = Metered(store)
    lineage = Lineage(metered)
    deadline = time.monotonic() + 20
    while metered.traffic().num_calls.get("read", 0) < num_reads or lineage._is_asking:
        assert time.monotonic() < deadline
        lineage.note(generation)
        time.sleep(0.001)
    return lineage


def replaced(store, generation: int, token: str) -> None:
    store.delete(f"control/generations/{generation:06d}")
    assert claim_generation(store, generation, token)


def test_a_store_whose_claim_stands_is_the_same_whatever_was_claimed_since(store):
    lineage = knowing(store, 2)
    assert claim_generation(store, 3, "other")
    assert not lineage.look() and not lineage.is_over


def test_a_claim_of_somebody_else_or_none_among_others_is_another_store(store):
    lineage = knowing(store, 2)
    replaced(store, 2, "second")
    assert lineage.look() and lineage.is_over
    lineage = knowing(store, 2)
    store.delete("control/generations/000002")
    assert lineage.look()


def test_a_store_without_any_claim_may_be_away_and_is_no_reason_to_drop_what_is_held(store):
    lineage = knowing(store, 1)
    for generation in (1, 2):
        store.delete(f"control/generations/{generation:06d}")
    assert not lineage.look()


def test_a_generation_that_nobody_claimed_is_asked_for_once_and_tells_nothing(store):
    lineage = knowing(store, 7)
    lineage.note(7)
    assert not lineage._is_asking and not lineage.look()


def test_a_store_that_cannot_be_asked_counts_as_the_same_and_is_asked_again(store):
    lineage = knowing(Faulty(store, [Lost("read", 1)]), 2, num_reads=2)
    replaced(store, 2, "second")
    assert lineage.look()
    away = knowing(Faulty(store, [Lost("read", 2)]), 2)
    replaced(store, 2, "third")
    assert not away.look()
    assert away.look()
