"""What two lives of a host write in one generation never has one name: none is taken for the other."""

import time
from typing import Any

import pytest
import torch

from checkpoint import (
    Catalog,
    Durable,
    LatestN,
    LocalHost,
    Saver,
    Share,
    Store,
    load,
    open_store,
    promote,
    prune,
    verify,
)
from checkpoint.engine import naming
from checkpoint.engine.naming import PackNames
from checkpoint.engine.receipt import RECEIPT_SEQ, read_receipt
from checkpoint.format.keys import (
    INDEX,
    MAX_PACK_SEQ,
    PACKS,
    PackKey,
    manifest_key,
    pack_key,
    parse_pack_key,
    parse_page_key,
)
from checkpoint.lifecycle.aside import set_aside
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW, closing_all, same_bits

GRACE_S = 1000.0
LIFE = "f" * 16


class Life:
    """One life of a host, of a training that claims no generation."""

    def __init__(self, store: Store) -> None:
        self._host = LocalHost(store, "local", arena_bytes=4 * MIB, tuning=QUICK)
        self._saver = Saver(self._host, "run", RAW)

    def save(self, step: int, seed: int) -> None:
        self._saver.save(step, state(seed), Share.alone(), {})
        assert self._saver.drain(20)
        (outcome,) = self._saver.outcomes()
        assert isinstance(outcome, Durable), outcome

    def close(self) -> None:
        self._saver.close()
        self._host.close(flush_s=1.0)


@pytest.fixture
def begin():
    with closing_all(Life) as make:
        yield make


def state(seed: int) -> dict[str, Any]:
    return {"weight": torch.randn(17_000, generator=torch.Generator().manual_seed(seed))}


def going_back(store: Store, step: int) -> None:
    """Set a step aside and free its bytes."""
    assert set_aside(store, step, "training went back", policy="abandoned")
    prune(store, [LatestN(1)], now_s=time.time() + 2 * GRACE_S, grace_s=GRACE_S, linger_s=0.0)


@pytest.mark.parametrize("step", [2, 3])
def test_what_was_saved_after_going_back_comes_to_a_tier_that_still_has_the_abandoned_bytes(
    tmp_path, begin, step
):
    near, far = (open_store(str(tmp_path / name)) for name in ("near", "far"))
    first = begin(near)
    first.save(1, seed=1)
    first.save(2, seed=2)
    for one in (1, 2):
        promote(near, far, one)
    set_aside(far, 2, "training went back", policy="abandoned")
    going_back(near, 2)
    begin(near).save(step, seed=3)
    assert promote(near, far, step).is_new
    for store in (near, far):
        assert same_bits(load(store, step).state, state(3)) and verify(store).is_sound


def test_a_life_that_was_thought_dead_and_its_successor_write_packs_of_their_own(tmp_path, begin):
    store = open_store(str(tmp_path))
    slow, successor = begin(store), begin(store)
    for step, life in enumerate((slow, successor, slow, successor), start=1):
        life.save(step, seed=step)
    assert verify(store).is_sound
    for step in range(1, 5):
        assert same_bits(load(store, step).state, state(step))


def test_a_receipt_without_its_manifest_is_taken_up_by_the_next_life_of_a_host_that_is_alone(tmp_path, begin):
    store = open_store(str(tmp_path))
    begin(store).save(5, seed=1)
    store.delete(manifest_key(5))  # as if the host had died before it was created
    (receipt,) = (read_receipt(store, key) for key in _receipts_in(store))
    assert receipt.content is None
    begin(store).save(5, seed=1)
    assert same_bits(load(store).state, state(1)) and verify(store).is_sound
    assert Catalog(store).manifest(5).packs == receipt.packs


def test_no_name_comes_again_although_all_that_had_one_is_gone(tmp_path, begin):
    store = open_store(str(tmp_path))
    seen: set[str] = set()
    for _ in range(3):
        begin(store).save(1, seed=1)
        names = {entry.key for prefix in (PACKS, INDEX) for entry in store.list(prefix)}
        written = {name for name in names if not name.endswith("-0000")}  # a receipt is a word, not content
        assert not written & seen
        seen |= written
        going_back(store, 1)
        assert not store.list(PACKS)


def test_numbers_that_run_out_go_on_in_a_life_of_their_own(monkeypatch):
    drawn = iter(["0" * 16, "1" * 16])
    assert parse_pack_key(pack_key(1, "h0", MAX_PACK_SEQ, LIFE)) == PackKey(1, "h0", MAX_PACK_SEQ, LIFE)
    monkeypatch.setattr(naming, "MAX_PACK_SEQ", 2)
    names = PackNames("h0", LIFE, lambda: next(drawn))
    taken = [names.take(1) for _ in range(7)]
    assert [(key.life[0], key.seq) for key in taken] == [*zip("fff000", [0, 1, 2] * 2, strict=True), ("1", 0)]
    assert names.take(2) == PackKey(2, "h0", 0, "1" * 16)


def test_saves_go_on_beyond_the_last_number_of_a_generation_and_all_of_them_can_be_read(
    tmp_path, begin, monkeypatch
):
    monkeypatch.setattr(naming, "MAX_PACK_SEQ", 2)
    store = open_store(str(tmp_path))
    life = begin(store)
    for step in range(1, 9):
        life.save(step, seed=step)
    assert len({_life_of(entry.key) for entry in store.list(PACKS)}) == 3
    assert verify(store).is_sound
    prune(store, [LatestN(4)], now_s=time.time() + 2 * GRACE_S, grace_s=GRACE_S, linger_s=0.0)
    assert verify(store).steps == (8, 7, 6, 5) and len(store.list(PACKS)) == 4
    assert same_bits(load(store).state, state(8))


def _receipts_in(store: Store) -> list[str]:
    keys = [entry.key for entry in store.list(INDEX)]
    return [key for key in keys if (page := parse_page_key(key)) and page.seq == RECEIPT_SEQ]


def _life_of(key: str) -> str:
    found = parse_pack_key(key)
    return found.life if found else ""
