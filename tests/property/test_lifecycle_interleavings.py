"""Saves that share packs, prunes and promotions, interleaved at every request: nothing alive loses a byte."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import NoCheckpoint, StoreUnavailable
from checkpoint.format.codec import checksum
from checkpoint.format.keys import EXPIRED, INDEX, MANIFESTS, PACKS, PROMOTING, SWEEPS
from checkpoint.format.manifest import Manifest, decode_manifest
from checkpoint.lifecycle.policies import LatestN
from checkpoint.lifecycle.promotion import promote
from checkpoint.lifecycle.retention import prune
from checkpoint.lifecycle.scrub import verify
from checkpoint.lifecycle.survey import objects_of
from checkpoint.store.contract import Store
from checkpoint.store.memory import MemoryStore
from tests.lifecycle_worlds import Clock, Stepped, Turns, save

GRACE_S = 600.0
IN_A_ROUND_S = 100.0  # less than the grace: no save takes longer than that


class World:
    """A near and a far store, whoever works on them, and what must always hold."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.near = MemoryStore("near", clock=self.clock)
        self.far = MemoryStore("far", clock=self.clock)
        self.saved: list[Manifest] = []
        self.next_step = 1
        self._seen: dict[tuple[str, bytes], dict[str, bytes]] = {}

    def check(self) -> None:
        """Every manifest that exists has all of its objects, and they are as when it was created."""
        for store in (self.near, self.far):
            values = {entry.key: bytes(store.read(entry.key)[0]) for entry in store.list("")}
            for key, data in values.items():
                if key.startswith(MANIFESTS):
                    named = {ref.key for ref in objects_of(decode_manifest(data, key))}
                    assert named <= values.keys(), f"{store}: {key} lacks {sorted(named - values.keys())}"
                    now = {each: checksum(values[each]) for each in named}
                    assert self._seen.setdefault((str(store), data), now) == now

    def saving(self, store: Store, values: tuple[int, ...], back: int | None) -> Callable[[], None]:
        """A keeper that saves the next step; it knows the checkpoint saved so many saves ago."""
        step, self.next_step = self.next_step, self.next_step + 1
        known = None if back is None or back >= len(self.saved) else self.saved[-1 - back]

        def act() -> None:
            manifest = save(store, step, values, known)
            if manifest is not None:
                self.saved.append(manifest)

        return act

    def pruning(self, store: Store, keep: int, linger_s: float) -> Callable[[], None]:
        """Somebody who prunes."""

        def act() -> None:
            prune(store, [LatestN(keep)], now_s=self.clock.now_s, grace_s=GRACE_S, linger_s=linger_s)

        return act

    def promoting(self, near: Store, far: Store, back: int) -> Callable[[], None]:
        """A keeper that promotes; what cannot be promoted now, later can."""

        def act() -> None:
            if back < len(self.saved):
                try:
                    promote(near, far, self.saved[-1 - back].step)
                except (NoCheckpoint, StoreUnavailable):  # the one or the other store is being pruned
                    return

        return act


@st.composite
def actors(draw):
    """Draw what an actor does, as a function of the world and its stepped stores."""
    match draw(st.sampled_from(["save", "save", "prune", "promote"])):
        case "save":
            values = draw(st.tuples(*[st.integers(0, 2)] * 2))
            back = draw(st.none() | st.integers(0, 3))
            return lambda world, near, far: world.saving(near, values, back)
        case "prune":
            keep, linger_s, is_near = (
                draw(st.integers(1, 2)),
                draw(st.sampled_from([0.0, 60.0])),
                draw(st.booleans()),
            )
            return lambda world, near, far: world.pruning(near if is_near else far, keep, linger_s)
        case _:
            back = draw(st.integers(0, 2))
            return lambda world, near, far: world.promoting(near, far, back)


PASTS = st.lists(st.tuples(st.tuples(*[st.integers(0, 2)] * 2), st.none() | st.integers(0, 2)), max_size=4)
ROUNDS = st.lists(
    st.tuples(st.sampled_from([0.0, 70.0, 2 * GRACE_S]), st.lists(actors(), min_size=2, max_size=4)),
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=100)
@given(PASTS, ROUNDS, st.integers(0, 2**32))
def test_what_exists_keeps_all_its_objects_whatever_happens_beside_it_and_garbage_ends(past, rounds, seed):
    live_through(past, rounds, seed)


@pytest.mark.soak
@settings(max_examples=20_000)
@given(PASTS, ROUNDS, st.integers(0, 2**32))
def test_what_exists_keeps_all_its_objects_through_many_more_interleavings(past, rounds, seed):
    live_through(past, rounds, seed)


def live_through(past, rounds, seed: int) -> None:
    """Make a past, play rounds of actors side by side, then let time pass and see that nothing is left."""
    world = World()
    for values, back in past:
        world.saving(world.near, values, back)()
        world.promoting(world.near, world.far, 0)()
    for store in (world.near, world.far):
        world.pruning(store, 1, 60.0)()
    chance = Random(seed)
    for seconds, acts in rounds:
        world.clock.now_s += seconds
        play(world, acts, chance)
    for store in (world.near, world.far):
        for _ in range(2):
            world.clock.now_s += 3 * GRACE_S
            assert prune(store, [LatestN(2)], now_s=world.clock.now_s, grace_s=GRACE_S).problems == ()
        world.check()
        assert_clean(store)


def play(world: World, acts, chance: Random) -> None:
    """Let actors work side by side, some of them until they are killed."""
    turns = Turns()
    near, far = Stepped(world.near, turns), Stepped(world.far, turns)
    ends_s = world.clock.now_s + IN_A_ROUND_S
    for number, make in enumerate(acts):
        turns.start(f"actor {number}", make(world, near, far))
    while living := turns.living():
        name = chance.choice(living)
        if chance.random() < 0.02:
            turns.kill(name)
        for _ in range(chance.choice([1, 1, 2, 3, 5, 8, 13, 30])):
            if name in turns.living():
                turns.grant(name)
                world.check()
        world.clock.now_s = min(world.clock.now_s + chance.choice([0, 0, 7]), ends_s)
    if turns.failures:
        raise turns.failures[0]


def assert_clean(store: MemoryStore) -> None:
    """Nothing is left but checkpoints, and what they need."""
    needed = {
        ref.key
        for entry in store.list(MANIFESTS)
        for ref in objects_of(decode_manifest(store.read(entry.key)[0], entry.key))
    }
    left = {entry.key for prefix in (PACKS, INDEX) for entry in store.list(prefix)}
    assert left == needed
    assert [store.list(prefix) for prefix in (EXPIRED, SWEEPS, PROMOTING)] == [[], [], []]
    if needed:
        assert verify(store).is_sound
