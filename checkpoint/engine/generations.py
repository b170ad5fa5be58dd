"""Generations: numbered claims on a run, made once each, so that two drivers never own the same world."""

import json

from checkpoint.errors import AlreadyExists, NotFound
from checkpoint.format.keys import generation_key, parse_generation_key
from checkpoint.store.contract import Store

PREFIX = "control/generations/"


def newest_generation(store: Store) -> int:
    """Return the newest claimed generation, 0 when there is none."""
    claimed = (parse_generation_key(entry.key) for entry in store.list(PREFIX))
    return max((generation for generation in claimed if generation is not None), default=0)


def claim_generation(store: Store, generation: int, token: str) -> bool:
    """Claim a generation for the owner of `token`; return whether it is ours.

    A claim that was written although the store reported an error is found again by its token.
    """
    key = generation_key(generation)
    try:
        store.put_new(key, json.dumps({"token": token}).encode())
    except AlreadyExists:
        return bool(json.loads(bytes(store.read(key)[0]))["token"] == token)
    return True


def who_claimed(store: Store, generation: int) -> str | None:
    """Return the claim on a generation, which is unlike any other; None if nobody claimed it."""
    try:
        return bytes(store.read(generation_key(generation))[0]).decode(errors="replace")
    except NotFound:
        return None
