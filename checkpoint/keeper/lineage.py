"""Which life of its store a keeper works for: one that was deleted and made anew is another store."""

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from checkpoint.engine.generations import newest_generation, who_claimed
from checkpoint.errors import CheckpointError
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.keeper")

_PATIENCE_S = 5.0  # well within the time in which a keeper has to answer


class Lineage:
    """Remembers who claimed the newest generation that it was told of, and looks whether that still holds.

    A store's generations only grow, and each is claimed once: if the claim is another's, or is gone while
    there are others, nothing that is known of the store is true of it any more. Thread-safe.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._generation = -1
        self._claim: str | None = None
        self._is_known = self._is_asking = False
        self.is_over = False

    def note(self, generation: int) -> None:
        """Take note that a world of this generation saves here; who claimed it is found out by the way."""
        with self._lock:
            if generation > self._generation:
                self._generation, self._claim, self._is_known = generation, None, False
            if generation < self._generation or self._is_known or self._is_asking:
                return
            self._is_asking = True
        threading.Thread(target=self._ask, args=(generation,), name="holdfast-claim", daemon=True).start()

    def look(self) -> bool:
        """Whether the store is another one by now. One that does not answer soon counts as the same."""
        with self._lock:
            generation, claim = self._generation, self._claim
        if claim is not None and not self.is_over:
            self.is_over = _soon(lambda: self._is_another(generation, claim))
            if self.is_over:
                log.error("the store was deleted or replaced: what is known and held of it is dropped")
        return self.is_over

    def _ask(self, generation: int) -> None:
        claim, is_known = None, False
        try:
            claim, is_known = who_claimed(self._store, generation), True
        except CheckpointError as error:
            log.warning("who claimed generation %d is not known yet: %s", generation, error)
        with self._lock:
            self._is_asking = False
            if generation == self._generation:
                self._claim, self._is_known = claim, is_known

    def _is_another(self, generation: int, claim: str) -> bool:
        found = who_claimed(self._store, generation)
        if found is not None:
            return found != claim
        return newest_generation(self._store) > 0  # else it may be that the store is only not mounted


def _soon(ask: Callable[[], bool]) -> bool:
    """Return the answer, or False if there is none in time."""
    answers: SimpleQueue[bool] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(ask())
        except CheckpointError as error:
            log.warning("whether the store is still the same cannot be told: %s", error)
            answers.put(False)

    threading.Thread(target=answer, name="holdfast-claim", daemon=True).start()
    try:
        return answers.get(timeout=_PATIENCE_S)
    except Empty:
        return False
