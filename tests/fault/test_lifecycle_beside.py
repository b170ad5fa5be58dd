"""A prune in the middle of a real save that shares packs: whatever is acknowledged is whole."""

import threading

import pytest

from checkpoint import Catalog, Failed, LatestN, LocalHost, SavePolicy, Saver, Share, load, prune, verify
from checkpoint.format.codec import Codec
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, durable_steps, run_state, same_bits
from tests.lifecycle_worlds import Clock, save

GRACE_S = 600.0


class Pruned:
    """A store in which somebody prunes as the `nth` request begins, whichever thread makes it."""

    def __init__(self, store: MemoryStore, clock: Clock) -> None:
        self.rival: int | None = None
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self.left = 0

    def __getattr__(self, verb: str):
        with self._lock:
            self.left -= 1
            if self.left == 0:
                if self.rival is not None:
                    save(self._store, self.rival, [1, 2], host="rival")
                prune(self._store, [LatestN(1)], now_s=self._clock.now_s, grace_s=GRACE_S, linger_s=0.0)
        return getattr(self._store, verb)


@pytest.mark.slow
@pytest.mark.parametrize("chain", [0, 3], ids=["whole chunks", "deltas"])
def test_a_prune_at_any_request_of_a_save_costs_at_most_that_save(chain):
    acknowledged = 0
    for nth in range(1, 24):
        clock = Clock()
        store = Pruned(MemoryStore("beside", clock=clock), clock)
        with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
            saver = Saver(host, "run", SavePolicy(codec=Codec.PLANES, delta_chain=chain))
            for step in (1, 2, 3, 4):
                store.left = nth if step == 3 else 0
                saver.save(step, run_state(step), Share.alone(), {})
                assert saver.drain(20)
                told = saver.outcomes()
                assert durable_steps(told) == [step] or [type(one) for one in told] == [Failed]
                acknowledged += len(durable_steps(told))
                latest = Catalog(store).latest()
                assert latest is not None and same_bits(load(store, latest).state, run_state(latest))
            saver.close()
        assert verify(store).is_sound and Catalog(store).latest() == 4
    assert acknowledged >= 4 * 23 - 5


@pytest.mark.slow
def test_what_a_save_shares_with_may_expire_at_any_request_of_it():
    """Another host's checkpoint is newer, so that the one that is built on is pruned at once."""
    outcomes = []
    for nth in range(1, 24):
        clock = Clock()
        store = Pruned(MemoryStore("rival", clock=clock), clock)
        store.rival = 100
        with LocalHost(store, arena_bytes=MIB, tuning=QUICK) as host:
            saver = Saver(host, "run", SavePolicy())
            for step in (1, 2, 3):
                store.left = nth if step == 3 else 0
                saver.save(step, run_state(step), Share.alone(), {})
                assert saver.drain(20)
                outcomes += [type(one) for one in saver.outcomes()]
            saver.close()
        assert verify(store).is_sound
    assert outcomes.count(Failed) < 8 and len(outcomes) == 3 * 23
