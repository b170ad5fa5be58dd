"""A driver's claims on the generations of its run, and whether another driver has claimed newer ones.

A worker that lost its driver, and saves alone what it holds, claims a generation too. It takes nobody's
place: a driver that lives passes over it.
"""

import json
import secrets

from checkpoint import Retrying, RetryPolicy, Store, claim_generation, newest_generation, who_claimed
from elastic.errors import Fenced

PATIENCE = RetryPolicy(deadline_s=600.0)  # as long as snapshots wait for a store that is away
_ALONE = "alone-"


def claim_alone(store: Store, generation: int, member: str) -> bool:
    """Claim a generation to save in it, as a worker that has no driver; return whether it is ours."""
    return claim_generation(store, generation, f"{_ALONE}{member}")


class Claims:
    """One driver's claims; `newest` is the newest generation it claimed, passed over, or found at first.

    Once the store has answered, it is tried for ten minutes if it does not any more.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.newest = newest_generation(store)
        self._is_given_up = False
        self._store = Retrying(store, PATIENCE, may_go_on=lambda: not self._is_given_up)
        self._run, self._token = run, secrets.token_hex(8)

    def give_up(self) -> None:
        """Claim nothing any more, whichever thread is at it: a claim would fence workers who still save."""
        self._is_given_up = True

    def claim(self, generation: int) -> bool:
        """Claim a generation; False if a worker saved alone in it. Raises Fenced if another driver has it."""
        self._check_held()
        is_ours = claim_generation(self._store, generation, self._token)
        if not is_ours and not self._is_alone(generation):
            raise Fenced(
                f"generation {generation} of run {self._run} belongs to another driver; this one stops"
            )
        self.newest = max(self.newest, generation)
        return is_ours

    def take_over(self) -> None:
        """Claim a generation after the newest one, so that an earlier driver is fenced from now on.

        Raises Fenced if another driver was quicker.
        """
        while not self.claim(self.newest + 1):
            pass

    def confirm(self) -> None:
        """Make sure that no driver has claimed a newer generation. Raises Fenced."""
        while (is_alone := self._is_alone(self.newest + 1)) is not None:
            if not is_alone:
                raise Fenced(f"run {self._run} was taken over by another driver; this one stops")
            self.newest += 1

    def _is_alone(self, generation: int) -> bool | None:
        """Say whether a worker without a driver has claimed this; None if nobody has."""
        self._check_held()
        claim = who_claimed(self._store, generation)
        return None if claim is None else str(json.loads(claim)["token"]).startswith(_ALONE)

    def _check_held(self) -> None:
        if self._is_given_up:
            raise Fenced(f"this driver has given run {self._run} up")
