"""Packs: small ones first, large chunks written from where they lie, little memory beside the arena."""

import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import Catalog, Durable, LocalHost, verify
from checkpoint.engine.arena import Arena, Region
from checkpoint.engine.contract import Content, Slot, SnapshotPlan, Ticket
from checkpoint.engine.digester import BATCH_BYTES, batches
from checkpoint.engine.encoding import Job, digest, digest_once, work_on
from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import ShareEntry, SnapshotEntry, Writing
from checkpoint.engine.pipeline import Tuning
from checkpoint.engine.source import StoreSource
from checkpoint.engine.worklist import Worklist
from checkpoint.format.codec import Codec, checksum, decode
from checkpoint.format.layout import Box
from checkpoint.format.records import MAX_CHUNK_BYTES
from checkpoint.store.contract import parts_of
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_shares import begin, give, handling, plan_of, rows_of
from tests.fault.checkpoint_worlds import MIB

TUNING = Tuning(poll_s=0.02, pack_bytes=8 * MIB, first_pack_bytes=MIB)


class Watching(MemoryStore):
    """Remembers of each pack how many bytes came in which parts."""

    def __init__(self):
        super().__init__("watching")
        self.packs = {}

    def put_new(self, key, data):
        if key.startswith("packs/"):
            self.packs[key] = parts_of(data)
        super().put_new(key, data)


def job_of(rows, treated, *, writing=Writing.SEALED, is_held=False):
    plan = plan_of(rows, treated)
    memory = memoryview(bytearray(plan.num_bytes + 64))
    for slot in plan.slots:
        memory[64 + slot.offset : 64 + slot.offset + slot.num_bytes] = list(rows.values())[
            slot.tensor
        ].tobytes()
    share = ShareEntry(plan, Region(64, plan.num_bytes), None, writing)
    return Job(share, tuple(range(len(plan.slots))), memory, is_held)


@pytest.mark.parametrize(("writing", "is_held"), [(Writing.OPEN, False), (Writing.SEALED, True)])
def test_what_the_trainer_still_compares_or_memory_holds_is_not_written_over(writing, is_held):
    rows = {"w": np.zeros(300_000, np.float32), "v": np.ones(7, np.int64)}
    job = job_of(rows, handling(codec=Codec.ZSTD), writing=writing, is_held=is_held)
    before = bytes(job.memory)
    done = work_on(job)
    assert bytes(job.memory) == before
    assert [one.is_in_arena for one in done] == [False, False]


def test_what_was_compressed_goes_back_to_its_place_and_decodes_to_what_was_there():
    rows = {"w": np.zeros(300_000, np.float32), "v": np.arange(99, dtype=np.int64)}
    job = job_of(rows, handling(codec=Codec.ZSTD))
    arrays: list[Any] = list(rows.values())
    for one, values in zip(work_on(job), arrays, strict=True):
        assert one.is_in_arena and one.data is not None and one.chunk.checksum == checksum(values.tobytes())
        stored = bytes(one.data)
        assert len(stored) < values.nbytes
        assert bytes(job.memory[one.chunk.offset :][: len(stored)]) == stored
        assert bytes(decode(one.chunk.codec, stored, values.nbytes)) == values.tobytes()


def test_a_digest_is_the_same_however_many_chunks_are_digested_together():
    rows = {f"t{number}": np.random.default_rng(number).random(50 + number % 3) for number in range(40)}
    job = job_of(rows, handling())
    together = digest(job.share, job.chunks, job.memory)
    assert [digest(job.share, (number,), job.memory) for number in job.chunks] == [[one] for one in together]
    assert digest_once(job.share, (3, 5), job.memory) == [together[3], together[5]]
    job.memory[:] = bytes(len(job.memory))
    assert digest_once(job.share, (5,), job.memory) == [together[5]]


@given(st.lists(st.integers(0, 3 * BATCH_BYTES) | st.integers(0, 2000), max_size=50))
def test_what_is_held_is_digested_from_its_end_and_no_large_chunk_waits_for_another(sizes):
    found = list(batches(sizes))
    assert [number for batch in reversed(found) for number in batch] == list(range(len(sizes)))
    assert all(len(batch) == 1 or sum(sizes[number] for number in batch) <= BATCH_BYTES for batch in found)


def test_the_first_packs_are_small_and_raw_chunks_are_not_copied():
    store = Watching()
    rows = {f"t{number}": np.random.default_rng(number).random(MIB // 8) for number in range(12)}
    with LocalHost(store, arena_bytes=32 * MIB, tuning=TUNING) as host:
        assert give(host, 1, rows)
    sizes = [sum(part.nbytes for part in parts) for _, parts in sorted(store.packs.items())]
    assert [round(size / MIB) for size in sizes] == [1, 2, 4, 5]
    assert all(max(part.nbytes for part in parts) == MIB for parts in store.packs.values())
    assert verify(store).is_sound


@pytest.mark.parametrize("hold", [0, 1])
def test_compressed_packs_take_little_memory_beside_the_arena(hold):
    store = Watching()
    rows = {f"t{n}": np.random.default_rng(n).integers(0, 1 << 15, MIB // 4, np.int32) for n in range(24)}
    with LocalHost(store, arena_bytes=64 * MIB, hold=hold, tuning=TUNING) as host:
        assert give(host, 1, rows, handling(codec=Codec.ZSTD))
    assert verify(store).is_sound
    assert all(chunk.codec is Codec.ZSTD for chunk in StoreSource(store).chunks(Catalog(store).manifest(1)))
    if hold:
        assert max(sum(part.nbytes for part in parts) for parts in store.packs.values()) < 3 * MIB


class Stuck(MemoryStore):
    """Takes no pack until it is let go, and then forgets them: what memory holds is not counted in it."""

    def __init__(self):
        super().__init__("stuck")
        self.waiting, self.may_go = [], threading.Event()

    def put_new(self, key, data):
        if key.startswith("packs/"):
            self.waiting.append(key)
            assert self.may_go.wait(60)
        else:
            super().put_new(key, data)


@pytest.mark.parametrize("codec", [Codec.PLANES, Codec.ZSTD])
def test_what_packs_pin_is_bounded_however_small_the_chunks_in_them_became(codec):
    chance = np.random.default_rng(1)
    values = np.zeros((26, MIB), np.float32)  # a chunk each, of which some 500 KiB are left
    for row in values:
        row[chance.integers(0, MIB, 120_000)] = chance.standard_normal(120_000)
    store, plan = Stuck(), {f"t{number}": row for number, row in enumerate(values)}
    with LocalHost(store, arena_bytes=128 * MIB, hold=1) as host:
        ticket = begin(host, 1, plan, plan_of(plan, handling(codec=codec)))
        tracemalloc.start()
        try:
            host.seal(ticket)
            deadline_s = time.monotonic() + 60
            while len(store.waiting) < Tuning().num_writers or not host._pipeline._outbox.full():
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            store.may_go.set()
            assert host.intake.drain(60)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            store.may_go.set()
            tracemalloc.stop()
    assert [one.tier for one in host.outcomes() if isinstance(one, Durable)] == ["memory", "store"]
    encoders_bytes = Tuning().num_encoders * 3 * MAX_CHUNK_BYTES  # what they write to, and scratch
    packs_bytes = 8 * MIB + Tuning().num_packs_in_memory * MIB // 2  # each is full with one chunk too many
    assert peak_bytes < encoders_bytes + packs_bytes + 2 * MIB


def test_chunks_keep_their_order_whatever_encoder_is_first():
    store = Watching()
    rows = {f"t{n}": np.random.default_rng(n).random(1000 * (1 + n * 7 % 13)) for n in range(60)}
    with LocalHost(store, arena_bytes=16 * MIB, tuning=Tuning(poll_s=0.02, num_encoders=4)) as host:
        plan = plan_of(rows, handling(codec=Codec.ZSTD))
        ticket = begin(host, 1, rows, plan)
        for chunk in range(len(plan.slots)):
            host.ready(ticket, chunk)
        host.seal(ticket)
    places = [(chunk.pack, chunk.offset) for chunk in StoreSource(store).chunks(Catalog(store).manifest(1))]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("codec", "hold", "is_at_once"),
    [(Codec.RAW, 0, True), (Codec.PLANES, 0, False), (Codec.ZSTD, 0, False), (Codec.PLANES, 1, True)],
)
def test_chunks_that_a_codec_shrinks_wait_for_the_seal_if_they_can_go_back_to_their_place(
    codec, hold, is_at_once
):
    intake = Intake("local", Arena(8 * MIB), hold)
    rows = rows_of(1, 5 * MIB)
    plan, ticket = plan_of(rows, handling(codec=codec)), Ticket("run", 0, 1, 0)
    intake.open(ticket, plan, None)
    intake.ready(ticket, (0,))
    work = intake.next_work(0.0)
    assert (work is not None) == is_at_once
    intake.seal(ticket)
    chunks = [chunk for work in iter(lambda: intake.next_work(0.0), None) for chunk in work.chunks]
    assert sorted([*chunks, *(work.chunks if work else ())]) == list(range(len(plan.slots)))
    intake.close()


@given(st.lists(st.sampled_from([64, 4000, MIB // 3, MIB, 3 * MIB]), min_size=1, max_size=40), st.integers(0))
def test_every_chunk_is_worked_on_once_small_ones_together_and_snapshots_in_their_order(sizes, seed):
    entries = [entry_of(step, sizes) for step in (1, 2)]
    work, chunks = Worklist(), list(range(len(sizes)))
    for entry in reversed(entries):
        cut = seed % (len(chunks) + 1)
        for part in (chunks[cut:], chunks[:cut]):
            if part:
                work.add(entry, 0, part)
        work.add_end(entry)
    for entry in entries:
        taken: list[int] = []
        while (item := work.take())[1] is not None:
            assert item[:2] == (entry.id, 0)
            assert len(item[2]) == 1 or sum(sizes[chunk] for chunk in item[2]) <= MIB
            taken += item[2]
        assert taken == chunks and item == (entry.id, None, ())
    assert not work


def entry_of(step, sizes):
    slots = tuple(Slot(number, Box((0,), (size,)), 0, size) for number, size in enumerate(sizes))
    plan = SnapshotPlan(("local",), Content((), "{}", ""), {}, handling(), slots)
    share = ShareEntry(plan, Region(0, 64), None)
    return SnapshotEntry((0, step), "run", ("local",), "local", plan.content, "store", 0.0, {0: share})


def test_an_unsealed_share_s_chunks_are_packed_before_its_end_and_given_up_with_it():
    store = Watching()
    with LocalHost(store, arena_bytes=4 * MIB, tuning=TUNING) as host:
        rows = rows_of(1, 2 * MIB)
        ticket = begin(host, 1, rows, plan_of(rows))
        host.ready(ticket, 0)
        host.spoil(ticket, "on purpose")
        assert give(host, 2, rows_of(2, 3 * MIB))
    assert Catalog(store).steps() == [2] and verify(store).is_sound
