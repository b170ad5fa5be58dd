"""What a run does to its stores, in a few sizes: each of them is broken off at every one of its writes."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from checkpoint import (
    Catalog,
    Codec,
    Failed,
    LatestN,
    LocalHost,
    Outcome,
    SavePolicy,
    Saver,
    Share,
    Store,
    StoreUnavailable,
    claim_generation,
    prune,
)
from checkpoint.lifecycle.promotion import promote
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, at_once, durable_steps, run_state

NUM_STEPS, NUM_KEPT = 3, 1
GRACE_S = 600.0
DELTAS = SavePolicy(codec=Codec.PLANES, delta_chain=2)

Tell = Callable[[str, int], None]  # called with a tier and a step, once that is acknowledged there


@dataclass(frozen=True, slots=True)
class Stores:
    """Two stores; `other` is the near one as a second host reaches it, `sound` as it is."""

    near: Store
    other: Store
    far: Store
    sound: Store


def _save(
    stores: Stores, tell: Tell, generation: int, policy: SavePolicy, besides: Callable[[], None]
) -> None:
    """Save some more steps from one host; do something at the same time, and once more in the end."""
    first = (Catalog(stores.sound).latest() or 0) + 1
    with LocalHost(stores.near, arena_bytes=MIB, tuning=QUICK) as host:
        saver = Saver(host, "run", policy)

        def save(step: int) -> None:
            saver.save(step, run_state(step), Share.alone(generation=generation), {})
            assert saver.drain(20)
            for durable in durable_steps(saver.outcomes()):
                tell("near", durable)

        for step in range(first, first + NUM_STEPS):
            at_once([partial(save, step), besides])
        saver.close()
    besides()


def save_shared(stores: Stores, tell: Tell, generation: int) -> None:
    """Save steps that share what did not change."""
    _save(stores, tell, generation, RAW, lambda: None)


def save_deltas(stores: Stores, tell: Tell, generation: int) -> None:
    """Save steps that are stored as what differs from the one before."""
    _save(stores, tell, generation, DELTAS, lambda: None)


def save_and_promote(stores: Stores, tell: Tell, generation: int) -> None:
    """Save steps, while those that are there are copied to the far store."""

    def copy() -> None:
        for step in set(Catalog(stores.sound).steps()) - set(Catalog(stores.far).steps()):
            promote(stores.near, stores.far, step)
            tell("far", step)

    _save(stores, tell, generation, RAW, _as_far_as_it_goes(copy))


def save_and_prune(stores: Stores, tell: Tell, generation: int) -> None:
    """Save deltas, while all but the newest checkpoints expire and are swept."""

    def expire() -> None:
        prune(stores.near, [LatestN(NUM_KEPT)], now_s=time.time(), grace_s=GRACE_S, linger_s=0)

    _save(stores, tell, generation, DELTAS, _as_far_as_it_goes(expire))


def save_as_two_hosts(stores: Stores, tell: Tell, generation: int) -> None:
    """Save steps of two ranks on two hosts; who fails lets the other one go on by claiming a generation."""
    first = (Catalog(stores.sound).latest() or 0) + 1
    names = ("a", "b")
    hosts = [
        LocalHost(store, name, arena_bytes=MIB, tuning=QUICK)
        for store, name in zip((stores.near, stores.other), names, strict=True)
    ]
    savers = [Saver(host, "run", RAW) for host in hosts]
    for step in range(first, first + NUM_STEPS):
        for rank, saver in enumerate(savers):
            saver.save(step, run_state(step), Share(generation, rank, len(names), names), {})
        for durable in durable_steps(_settled(savers, stores.sound, generation)):
            tell("near", durable)
    for saver in savers:
        saver.close()
    for host in hosts:
        host.close()


SCENARIOS: Mapping[str, Callable[[Stores, Tell, int], None]] = {
    "shared": save_shared,
    "deltas": save_deltas,
    "two hosts": save_as_two_hosts,
    "promoted": save_and_promote,
    "pruned": save_and_prune,
}


def _settled(savers: list[Saver], store: Store, generation: int) -> tuple[Outcome, ...]:
    seen: list[Outcome] = []
    deadline = time.monotonic() + 60.0
    while sum(saver.drain(0.02) for saver in savers) < len(savers):  # each of them is asked
        assert time.monotonic() < deadline, "a host waits for ever"
        for saver in savers:
            seen += saver.outcomes()
        if any(isinstance(one, Failed) for one in seen):
            claim_generation(store, generation + 1, "next")
    return (*seen, *(one for saver in savers for one in saver.outcomes()))


def _as_far_as_it_goes(act: Callable[[], None]) -> Callable[[], None]:
    def attempt() -> None:
        with suppress(StoreUnavailable):
            act()

    return attempt
