"""Deltas: what changed little is stored as its difference, in short chains, and restores bit by bit."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Catalog, Durable, LatestN, LocalHost, prune, verify
from checkpoint.engine.source import StoreSource
from checkpoint.format.codec import Codec
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.layout import Box
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_shares import begin, handling, plan_of
from tests.fault.checkpoint_worlds import MIB, QUICK, closing_all
from tests.wrapped_stores import Metered

CHAIN = 3


@pytest.fixture
def store():
    return MemoryStore("delta")


def drifting(step: int, size: int = 100_000) -> np.ndarray:
    """Return weights that drift a little from step to step, as bits of bfloat16."""
    start = np.random.default_rng(0).standard_normal(size, np.float32)
    drift = np.random.default_rng(1).standard_normal(size, np.float32) * 1e-4 * step
    return (start + drift).view(np.uint32).__rshift__(16).astype(np.uint16)


def rows_at(step: int) -> dict[str, np.ndarray]:
    return {"w": drifting(step), "noise": np.random.default_rng(step).integers(0, 1 << 16, 40_000, np.uint16)}


class Run:
    """A host that saves steps as deltas, one after the other."""

    def __init__(self, store, *, hold=0, chain=CHAIN, codec=Codec.ZSTD, generation=0):
        self.host = LocalHost(store, arena_bytes=2 * MIB, hold=hold, tuning=QUICK)
        self.treated = handling(codec=codec, delta_chain=chain)
        self.generation = generation

    def save(self, step, rows=None):
        rows = rows_at(step) if rows is None else rows
        self.host.seal(begin(self.host, step, rows, plan_of(rows, self.treated), generation=self.generation))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for outcome in self.host.outcomes():
                if outcome.step == step and getattr(outcome, "tier", "") != "memory":
                    assert isinstance(outcome, Durable), outcome
                    return outcome
            time.sleep(0.001)
        raise AssertionError(f"no word of step {step}")

    def close(self):
        self.host.close(flush_s=1.0)


@pytest.fixture
def run_of():
    with closing_all(Run) as make:
        yield make


def chunks_of(store, step):
    manifest = Catalog(store).manifest(step)
    return {manifest.tensors[chunk.tensor].name: chunk for chunk in StoreSource(store).chunks(manifest)}


@pytest.mark.parametrize("hold", [0, 1])
def test_small_changes_take_little_room_in_chains_of_bounded_length(store, run_of, hold):
    run = run_of(store, hold=hold)
    for step in range(1, 10):
        run.save(step)
    lengths = [chunks_of(store, step)["w"].num_bases for step in range(1, 10)]
    assert lengths == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    sizes = [chunks_of(store, step)["w"].num_bytes for step in range(1, 10)]
    assert all(size < 0.6 * sizes[0] for size, length in zip(sizes, lengths, strict=True) if length)
    assert verify(store).is_sound


def test_what_has_nothing_in_common_with_its_past_is_stored_in_full(store, run_of):
    run = run_of(store)
    for step in range(1, 4):
        run.save(step)
        assert chunks_of(store, step)["noise"].num_bases == 0


def test_a_delta_that_takes_as_much_as_the_whole_is_not_worth_its_chain(store, run_of):
    run = run_of(store)
    for step in (1, 2):
        low = np.random.default_rng(step).integers(0, 256, 50_000).astype(np.int32)
        run.save(step, {"low": low})
        chunk = chunks_of(store, step)["low"]
        assert chunk.codec is Codec.ZSTD and chunk.num_bases == 0


def test_without_a_chain_and_with_the_raw_codec_there_are_no_deltas(store, run_of):
    variants: tuple[dict[str, Any], ...] = ({"chain": 0}, {"codec": Codec.RAW})
    for number, options in enumerate(variants):
        run = run_of(store, generation=number, **options)
        for step in range(10 * number + 1, 10 * number + 4):
            run.save(step)
            assert all(chunk.num_bases == 0 for chunk in chunks_of(store, step).values())


def test_with_the_earlier_snapshot_held_no_base_is_read_from_the_store(store, run_of):
    metered = Metered(store)
    run = run_of(metered, hold=1)
    for step in (1, 2, 3):
        run.save(step)
    assert chunks_of(store, 3)["w"].num_bases == 2
    assert metered.traffic().num_bytes["read"] < 100_000  # manifests only
    plain = Metered(MemoryStore("plain"))
    again = run_of(plain)
    for step in (1, 2, 3):
        again.save(step)
    assert plain.traffic().num_bytes["read"] > 100_000


def test_a_host_that_starts_anew_goes_on_with_deltas(store, run_of):
    run_of(store).save(1)
    run_of(store, generation=1).save(2)
    assert chunks_of(store, 2)["w"].num_bases == 1 and verify(store).is_sound


def test_a_damaged_base_is_noticed_and_nothing_is_built_on_it(store, run_of):
    run = run_of(store)
    run.save(1)
    pack = Catalog(store).manifest(1).packs[0]
    data = bytearray(store.read(pack.key)[0])
    data[chunks_of(store, 1)["w"].offset + 100] ^= 1
    store.put(pack.key, bytes(data))
    run.save(2)
    assert chunks_of(store, 2)["w"].num_bases == 0 and verify(store, 2).is_sound


def test_an_unchanged_delta_is_shared_with_its_whole_chain(store, run_of):
    run = run_of(store)
    for step in (1, 2):
        run.save(step)
    run.save(3, rows_at(2))
    assert chunks_of(store, 3)["w"].num_bases == 1
    assert Catalog(store).manifest(3).packs[0].key == Catalog(store).manifest(2).packs[0].key
    assert verify(store).is_sound


def test_bases_outlive_the_checkpoints_that_they_were_made_for(store, run_of):
    run = run_of(store)
    for step in (1, 2, 3):
        run.save(step)
        prune(store, [LatestN(1)], now_s=time.time(), grace_s=1000.0, linger_s=0.0)
    assert Catalog(store).steps() == [3] and chunks_of(store, 3)["w"].num_bases == 2
    assert verify(store).is_sound


@given(
    changed=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=7),
    hold=st.integers(0, 1),
)
@settings(max_examples=15, deadline=None)
def test_whatever_changes_every_step_restores_as_it_was_saved(changed, hold):
    store = MemoryStore("any")
    rows = {f"t{number}": drifting(0, 2000 + number) for number in range(3)}
    saved = []
    run = Run(store, hold=hold)
    for step, which in enumerate(changed, 1):
        for number, is_changed in enumerate(which):
            if is_changed:
                rows[f"t{number}"] = drifting(step, 2000 + number)
        saved.append(dict(rows))
        run.save(step, dict(rows))
    run.close()
    assert verify(store).is_sound
    for step, wanted in enumerate(saved, 1):
        found = {tensor.name: tensor for tensor in Catalog(store).manifest(step).tensors}
        for name, values in wanted.items():
            assert found[name].fingerprint == fingerprint(
                values.tobytes(), str(values.dtype), values.shape, Box.whole(values.shape)
            )
