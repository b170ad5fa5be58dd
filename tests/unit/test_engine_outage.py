"""While the store cannot be reached snapshots wait; they become durable when it is back in time."""

import threading
import time
from dataclasses import replace

import pytest

from checkpoint import Failed, LocalHost, Saver, Share, StoreRefused, StoreUnavailable, load, verify
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, durable_steps, same_bits, save_alone, small_state
from tests.wrapped_stores import Faulty, Lost, Unanswered

pytestmark = pytest.mark.usefixtures("quiet_retries")

PATIENT = replace(QUICK, poll_s=0.005, outage_s=60.0)


@pytest.fixture
def inner():
    return MemoryStore("outage")


class Away(MemoryStore):
    """A store that takes no writes, for one reason."""

    def __init__(self, error: type[StoreUnavailable]) -> None:
        super().__init__("away")
        self._error = error
        self.num_asked = 0
        self.asked = threading.Event()

    def put_new(self, key, data):
        self.num_asked += 1
        if self.num_asked > 1 or self._error is StoreRefused:
            self.asked.set()
        raise self._error("away on purpose")


def save_in(store, tuning, step=1):
    with LocalHost(store, arena_bytes=MIB, tuning=tuning) as host:
        saver = Saver(host, "run", RAW)
        outcomes = save_alone(saver, step)
        saver.close()
    return outcomes


@pytest.mark.parametrize("fault", [Lost, Unanswered])
@pytest.mark.parametrize("k", [1, 2, 3, 4], ids=["pack", "page", "receipt", "manifest"])
def test_a_snapshot_outlasts_an_outage_wherever_it_strikes(inner, fault, k):
    store = Faulty(inner, [fault("put_new", nth) for nth in range(k, k + 2)])
    assert durable_steps(save_in(store, PATIENT)) == [1]
    assert verify(inner).is_sound and same_bits(load(inner).state, small_state(1))


@pytest.mark.parametrize("verb", ["list", "read"])
def test_a_snapshot_outlasts_an_outage_of_reads(inner, verb):
    store = Faulty(inner, [Lost(verb, nth) for nth in range(1, 3)])
    assert durable_steps(save_in(store, PATIENT)) == [1]
    assert verify(inner).is_sound


def test_an_outage_longer_than_patience_fails_the_snapshot():
    store = Away(StoreUnavailable)
    (outcome,) = save_in(store, replace(PATIENT, outage_s=0.05))
    assert isinstance(outcome, Failed) and "away on purpose" in outcome.why
    assert store.num_asked > 1


def test_a_store_that_refuses_fails_the_snapshot_at_once():
    store = Away(StoreRefused)
    (outcome,) = save_in(store, PATIENT)
    assert isinstance(outcome, Failed) and store.num_asked == 1


def test_a_host_that_closes_waits_for_no_store_beyond_its_flush():
    store = Away(StoreUnavailable)
    host = LocalHost(store, arena_bytes=MIB, tuning=PATIENT)
    saver = Saver(host, "run", RAW)
    saver.save(1, small_state(1), Share.alone(), {})
    assert store.asked.wait(10)
    began_s = time.monotonic()
    assert not host.close(flush_s=0.01)
    assert time.monotonic() - began_s < 10
    saver.close()


def test_a_retry_ends_when_it_may_not_go_on(inner):
    store = Faulty(inner, [Lost("list", nth) for nth in range(1, 10)])
    left = iter([True, True, True, True, False])  # after each failure, and after each wait
    with pytest.raises(StoreUnavailable, match="number 3 was lost"):
        Retrying(store, RetryPolicy(60.0, 0.001, 0.002), may_go_on=lambda: next(left)).list("")
