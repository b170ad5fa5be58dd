"""How a worker that lost its driver saves what no world is left to save: alone, under a claim of its own."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Catalog, Store, newest_generation
from elastic.runtime.claims import claim_alone

MAX_TRIES = 5
LOOK_EVERY_S, NUM_LOOKS = 1.0, 30  # between two tries
RENEW_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Survivor:
    """A worker that holds all of the state after `step` steps.

    `save` makes that durable in a generation that it is given, or says that it could not; `is_orphaned` tells
    whether there is still no driver.
    """

    member: str
    step: int
    save: Callable[[int], bool]
    is_orphaned: Callable[[], bool] = lambda: True


def save_alone(store: Store, survivor: Survivor, wait: Callable[[float], None] = time.sleep) -> None:
    """See to it that a survivor's step, or a newer one, is durable, as long as there is no driver to do so.

    Who loses a claim to another one lets that save first, which may hold the same step; `wait` sleeps.
    """
    catalog = Catalog(store)

    def is_needed() -> bool:
        return survivor.is_orphaned() and survivor.step > (catalog.latest() or 0)

    for _ in range(MAX_TRIES):
        if not is_needed():
            return
        generation = newest_generation(store) + 1
        if claim_alone(store, generation, survivor.member) and survivor.save(generation):
            return
        for _ in range(NUM_LOOKS):
            if not is_needed():
                return
            wait(LOOK_EVERY_S)  # for the other one's checkpoint, or for what kept ours from being one to pass


def keep_ray(lease: Path, is_orphaned: Callable[[], bool], most_s: float) -> threading.Thread:
    """Renew the lease of a local Ray, if there is one, while a worker without a driver finishes and saves.

    For so many seconds in a row at most: one that hangs does not keep it for ever.
    """

    def renew() -> None:
        orphaned_s = 0.0
        while True:
            time.sleep(RENEW_EVERY_S)  # a lease is longer; the thread ends with its process
            orphaned_s = orphaned_s + RENEW_EVERY_S if is_orphaned() else 0.0
            if 0 < orphaned_s <= most_s and lease.exists():
                lease.touch()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    return thread
