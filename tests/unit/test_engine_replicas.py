"""Replicas read each byte once between them, and fail, fall back and succeed together."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import Restored, restore_into
from checkpoint.engine.source import StoreSource
from checkpoint.engine.targets import Wanted
from checkpoint.errors import CheckpointError, Mismatch, NoCheckpoint, StoreUnavailable, Unsupported
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box, split_box
from checkpoint.format.sealed import seal, unseal
from checkpoint.store.memory import MemoryStore
from tests.restore_samples import Manner, Unsteady, Written, copy_store, write_cut
from tests.wrapped_stores import Metered

SIZE = 3


class Table:
    """Where the ranks of a group meet: one thread each."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.memory: bytes = b""
        self.is_garbled: Callable[[bytes], bytes] = lambda data: data


class Seat:
    """One rank's place in a group of threads."""

    def __init__(self, table: Table, rank: int, size: int) -> None:
        self._table = table
        self.rank = rank
        self.size = size

    def broadcast(self, memory: memoryview, root: int) -> None:
        """Hand over root's memory."""
        if self.rank == root:
            self._table.memory = bytes(memory)
        self._table.barrier.wait(20)
        if self.rank != root:
            memory[:] = self._table.is_garbled(self._table.memory)
        self._table.barrier.wait(20)


def write(store: Any, step: int, codec: Codec = Codec.RAW) -> Written:
    tensors = {
        f"w{i}": ("float32", (np.arange(96 * 64, dtype=np.uint32) * (step + i)).reshape(96, 64))
        for i in range(3)
    }
    tensors |= {"tiny": ("int64", np.array(step, "<u8")), "none": ("float32", np.zeros((0, 3), "<u4"))}
    boxes = {name: split_box(Box.whole(bits.shape), 8, 4096) for name, (_, bits) in tensors.items()}
    return write_cut(store, step, tensors, boxes, Manner(codec=lambda: codec, num_packs=2))


def whole(written: Written) -> list[Wanted]:
    return [
        Wanted(
            name,
            dtype,
            bits.shape,
            Box.whole(bits.shape),
            torch.zeros(bits.shape, dtype=getattr(torch, dtype)),
        )
        for name, (dtype, bits) in written.tensors.items()
    ]


def all_ranks(
    stores: Sequence[Any], wanted: Sequence[list[Wanted]], step: int | None = None, table: Table | None = None
) -> list[Restored | CheckpointError]:
    """Restore on every rank in a thread of its own; return what each returned or raised."""
    table = table or Table(len(stores))
    results: list[Any] = [None] * len(stores)

    def run(rank: int) -> None:
        policy = ReadPolicy(group=Seat(table, rank, len(stores)))
        try:
            results[rank] = restore_into(StoreSource(stores[rank]), wanted[rank], step=step, policy=policy)
        except CheckpointError as error:
            results[rank] = error
        except Exception:
            table.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def is_filled(written: Written, wanted: Sequence[Wanted]) -> bool:
    for one in wanted:
        bits = written.tensors[one.name][1][one.box.within(Box.whole(one.shape))]
        assert isinstance(one.target, torch.Tensor)
        if (
            one.target.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            != np.ascontiguousarray(bits).tobytes()
        ):
            return False
    return True


@pytest.mark.parametrize("codec", list(Codec))
def test_every_byte_is_read_by_one_of_the_replicas_and_all_of_them_have_it_all(codec):
    store = MemoryStore()
    written = write(store, 1, codec)
    wanted = [whole(written) for _ in range(SIZE)]
    results = all_ranks([store] * SIZE, wanted)
    assert all(isinstance(one, Restored) and one.manifest == written.manifest for one in results)
    assert all(is_filled(written, one) for one in wanted)
    shares = [one.report.num_bytes for one in results if isinstance(one, Restored)]
    stored = sum(chunk.num_bytes for chunk, _ in written.records.values())
    assert stored <= sum(shares) <= stored * 1.05 + SIZE * 4096
    assert min(shares) > stored / SIZE / 2


def test_replicas_of_a_shard_fill_views_of_their_own_kind():
    store = MemoryStore()
    written = write(store, 1)
    box = Box((5, 7), (60, 33))
    kinds = [torch.zeros(60, 33), torch.zeros(33, 60).t(), torch.zeros(60, 66)[:, ::2]]
    wanted = [[Wanted("w1", "float32", (96, 64), box, kind)] for kind in kinds]
    assert all(isinstance(one, Restored) for one in all_ranks([store] * SIZE, wanted))
    assert all(is_filled(written, one) for one in wanted)


def test_what_one_rank_cannot_read_makes_all_of_them_fall_back():
    store = MemoryStore()
    old = write(store, 1)
    new = write(store, 2)
    bad = copy_store(store)
    for pack in new.manifest.packs:
        bad.delete(pack.key)
    for rank in range(SIZE):
        wanted = [whole(old) for _ in range(SIZE)]
        stores = [bad if one == rank else store for one in range(SIZE)]
        results = all_ranks(stores, wanted)
        for one in results:
            assert isinstance(one, Restored) and one.manifest.step == 1
            assert [fallback.step for fallback in one.report.fallbacks] == [2]
            assert f"on rank {rank}" in one.report.fallbacks[0].why
        assert all(is_filled(old, one) for one in wanted)
        assert all(type(one).__name__ == "Corrupt" for one in all_ranks(stores, wanted, step=2))


def test_an_outage_or_a_newer_version_on_one_rank_is_raised_on_all():
    store = MemoryStore()
    written = write(store, 1)

    def out(number: int, key: str, found: Any) -> Any:
        raise StoreUnavailable("on purpose")

    wanted = [whole(written) for _ in range(SIZE)]
    results = all_ranks([store, Unsteady(store, out), store], wanted)
    assert all(isinstance(one, StoreUnavailable) and "on rank 1" in str(one) for one in results)
    newer = copy_store(store)
    key = manifest_key(1)
    newer.put(key, seal("manifest", unseal("manifest", newer.read(key)[0], key), 2))
    results = all_ranks([newer, newer, newer], wanted)
    assert all(isinstance(one, Unsupported) for one in results)
    assert all(isinstance(one, NoCheckpoint) for one in all_ranks([MemoryStore()] * SIZE, wanted))


def test_replicas_that_want_different_boxes_or_see_different_checkpoints_are_told_so():
    store, other = MemoryStore(), MemoryStore()
    written = write(store, 1)
    changed = {**written.tensors, "tiny": ("int64", np.array(9, "<u8"))}
    boxes = {name: [Box.whole(bits.shape)] if bits.size else [] for name, (_, bits) in changed.items()}
    write_cut(other, 1, changed, boxes)
    wanted = [whole(written) for _ in range(SIZE)]
    results = all_ranks([store, store, other], wanted)
    assert all(isinstance(one, Mismatch) and "ranks 0 and 2" in str(one) for one in results)
    results = all_ranks([store] * SIZE, [wanted[0], wanted[1][:-1], wanted[2]])
    assert all(isinstance(one, Mismatch) and "wanted boxes" in str(one) for one in results)


def test_what_arrives_otherwise_than_it_was_sent_is_refused_by_all():
    store = MemoryStore()
    written = write(store, 1)
    table = Table(SIZE)
    table.is_garbled = lambda data: data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 3000 else data
    results = all_ranks([store] * SIZE, [whole(written) for _ in range(SIZE)], 1, table)
    assert all(type(one).__name__ == "Corrupt" and "did not arrive" in str(one) for one in results)


def test_a_group_of_one_restores_alone():
    store = Metered(MemoryStore())
    written = write(store, 1)
    wanted = [whole(written)]
    assert isinstance(all_ranks([store], wanted)[0], Restored) and is_filled(written, wanted[0])
