"""How much a restore reads, what it holds meanwhile, and which memory it fills."""

import random
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.engine import filling, reading, source
from checkpoint.engine.foreseeing import foresee
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.regions import Regions
from checkpoint.engine.restore import load, restore_into
from checkpoint.engine.targets import Wanted
from checkpoint.errors import Corrupt, Mismatch, NotFound
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box, split_box
from checkpoint.store.memory import MemoryStore
from tests.restore_samples import Manner, Unsteady, Written, write_cut
from tests.wrapped_stores import Metered

MIB = 1 << 20


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def grid(shape: tuple[int, int], value: int = 3) -> tuple[str, np.ndarray]:
    return "float32", ((np.arange(shape[0] * shape[1], dtype=np.uint32) * value) % 1000).reshape(shape)


def write_rows(store: Any, codec: Codec = Codec.RAW, num_rows: int = 64, chunk_bytes: int = 4096) -> Written:
    """Write a few tensors in chunks of whole rows, all in one pack."""
    tensors = {f"w{i}": grid((num_rows, 64), i + 3) for i in range(4)}
    boxes = {name: split_box(Box.whole(bits.shape), 4, chunk_bytes) for name, (_, bits) in tensors.items()}
    return write_cut(store, 1, tensors, boxes, Manner(codec=lambda: codec))


def want(written: Written, name: str, box: Box) -> tuple[Wanted, torch.Tensor]:
    target = torch.zeros(box.size)
    return Wanted(name, "float32", written.tensors[name][1].shape, box, target), target


def is_filled(written: Written, one: Wanted) -> bool:
    bits = written.tensors[one.name][1][one.box.within(Box.whole(one.shape))]
    assert isinstance(one.target, torch.Tensor)
    return bits_of(one.target.resolve_conj()) == np.ascontiguousarray(bits).tobytes()


def test_only_what_is_wanted_is_read():
    store = Metered(MemoryStore())
    written = write_rows(store)
    one, target = want(written, "w2", Box((16, 0), (16, 64)))
    before = store.traffic().num_bytes.get("read", 0)
    report = restore_into(store, [one]).report
    assert is_filled(written, one) and target.shape == (16, 64)
    assert report.num_bytes == 16 * 64 * 4 and report.num_requests == 1
    index = sum(page.num_bytes for page in written.manifest.pages) + 4096  # and the manifest
    assert store.traffic().num_bytes["read"] - before < report.num_bytes + index + 4096


def test_neighbours_are_read_at_once_and_far_apart_ones_are_not_joined():
    store = MemoryStore()
    written = write_rows(store, num_rows=512)
    wanted = [want(written, f"w{i}", Box((0, 0), (512, 64)))[0] for i in range(4)]
    assert restore_into(store, wanted).report.num_requests == 1
    apart = [want(written, "w0", Box((row, 0), (16, 64)))[0] for row in (0, 32, 64)]
    report = restore_into(store, apart).report
    assert report.num_requests == 3 and report.num_bytes == 3 * 4096


def test_only_the_pages_that_are_needed_are_read():
    store = MemoryStore()
    tensors = {f"w{i}": grid((8, 64), i + 1) for i in range(6)}
    boxes = {name: [Box((0, 0), (8, 64))] for name in tensors}
    written = write_cut(store, 1, tensors, boxes, Manner(chunks_per_page=1))
    for page in written.manifest.pages[:5]:
        store.delete(page.key)
    one, _ = want(written, "w5", Box((2, 3), (4, 5)))
    restore_into(store, [one])
    assert is_filled(written, one)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("w9", "float32", (64, 64)), ("w0", "int32", (64, 64)), ("w0", "float32", (64, 65))],
)
def test_a_tensor_that_the_checkpoint_has_not_or_has_otherwise_is_a_mismatch(name, dtype, shape):
    store = MemoryStore()
    write_rows(store)
    target = torch.zeros(shape, dtype=getattr(torch, dtype))
    with pytest.raises(Mismatch, match=name):
        restore_into(store, [Wanted(name, dtype, shape, Box.whole(shape), target)])


def test_a_target_that_cannot_take_the_box_is_refused_before_anything_is_read():
    store = MemoryStore()
    write_rows(store)
    for target in (torch.zeros(64, 63), torch.zeros(64, 64).double(), bytes(64 * 64 * 4), bytearray(3)):
        with pytest.raises(Mismatch, match="w0"):
            restore_into(store, [Wanted("w0", "float32", (64, 64), Box.whole((64, 64)), target)])
    with pytest.raises(Mismatch, match="w0"):
        restore_into(store, [Wanted("w0", "float32", (64, 64), Box((1, 0), (64, 64)), torch.zeros(64, 64))])


def test_a_conjugate_view_is_filled_with_the_values_that_were_saved():
    store = MemoryStore()
    values = torch.randn(5, dtype=torch.complex64)
    bits = values.view(torch.int64).numpy().view("<u8")
    written = write_cut(store, 1, {"c": ("complex64", bits)}, {"c": [Box.whole((5,))]})
    target = torch.zeros(5, dtype=torch.complex64).conj()
    restore_into(store, [Wanted("c", "complex64", (5,), Box.whole((5,)), target)])
    assert torch.equal(target.resolve_conj(), values) and written.manifest.step == 1


class Direct(MemoryStore):
    """A store that reads into the caller's memory."""

    num_plain = 0

    def read_into(self, key: str, offset: int, pieces: Any) -> None:
        """Fill memory."""
        value = bytes(super().read(key)[0])
        for memory in pieces:
            if offset + len(memory) > len(value):
                raise NotFound(f"{key} is too short")
            memory[:] = value[offset : offset + len(memory)]
            offset += len(memory)

    def read(self, key: str, ranges: Any = None) -> Any:
        self.num_plain += bool(ranges) and key.startswith("packs/")
        return super().read(key, ranges)


def test_large_raw_chunks_go_straight_to_their_place_and_are_proved_there(monkeypatch):
    store = Direct()
    written = write_rows(store, num_rows=2048, chunk_bytes=256 << 10)
    wanted = [want(written, f"w{i}", Box((0, 0), (2048, 64)))[0] for i in range(4)]
    report = restore_into(store, wanted).report
    assert all(is_filled(written, one) for one in wanted)
    assert report.num_bytes == 4 * 2048 * 64 * 4
    assert store.num_plain == 0
    key = written.manifest.packs[0].key
    bad = bytearray(MemoryStore.read(store, key)[0])
    bad[300_000] ^= 1
    store.put(key, bad)
    with pytest.raises(Corrupt, match="checksum"):
        restore_into(store, wanted, step=1)
    assert store.num_plain == 2, "what did not prove right was read again, the plain way; and so was that"
    store.put(key, bytes(bad[:-400_000]))
    with pytest.raises(Corrupt, match="too short"):
        restore_into(store, wanted, step=1)


def test_a_large_chunk_that_is_wanted_twice_fills_both_places():
    store = Direct()
    written = write_rows(store, num_rows=2048, chunk_bytes=256 << 10)
    wanted = [want(written, "w1", Box((0, 0), (2048, 64)))[0] for _ in range(2)]
    restore_into(store, wanted)
    assert all(is_filled(written, one) for one in wanted)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(65, 400), st.integers(257, 1100)),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
    piece_bytes=st.integers(1, 300_000),
)
def test_columns_of_large_chunks_come_through_a_little_memory_and_are_proved(shape, cuts, piece_bytes):
    store = Direct()
    boxes = split_box(Box.whole(shape), 4, 1 << 18) if shape[0] * shape[1] * 4 > 1 << 19 else None
    written = write_cut(store, 1, {"w": grid(shape)}, {"w": boxes or [Box.whole(shape)]})
    wanted = [
        want(
            written,
            "w",
            Box((0, int(at * (shape[1] - 1))), (shape[0], max(1, int(some * shape[1] * (1 - at))))),
        )[0]
        for at, some in cuts
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_PIECE_BYTES", piece_bytes)
        restore_into(store, wanted)
        assert all(is_filled(written, one) for one in wanted)
        key = written.manifest.packs[0].key
        bad = bytearray(MemoryStore.read(store, key)[0])
        bad[piece_bytes % (shape[0] * shape[1] * 4)] ^= 1
        store.put(key, bad)
        with pytest.raises(Corrupt, match="checksum"):
            restore_into(store, wanted, step=1)


def test_large_chunks_are_asked_for_in_no_ranges_if_their_rows_lie_in_memory():
    store = Direct()
    written = write_rows(store, num_rows=2048, chunk_bytes=256 << 10)
    wanted = [want(written, "w1", Box((0, start), (2048, 32)))[0] for start in (0, 16, 32)]
    report = restore_into(store, wanted).report
    assert all(is_filled(written, one) for one in wanted)
    assert (store.num_plain, report.num_bytes) == (0, 2048 * 64 * 4)


@settings(max_examples=25)
@given(
    corners=st.lists(
        st.tuples(st.integers(0, 1500), st.integers(0, 250), st.integers(1, 900), st.integers(1, 200)),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_foreseen_of_a_restore_is_what_it_reads(corners):
    store, shape = Direct(), (2048, 256)
    written = write_cut(store, 1, {"w": grid(shape)}, {"w": split_box(Box.whole(shape), 4, 1 << 19)})
    boxes = [
        Box((row, column), (min(height, 2048 - row), min(width, 256 - column)))
        for row, column, height, width in corners
    ]
    report = restore_into(store, [want(written, "w", box)[0] for box in boxes]).report
    table = source.StoreSource(store).chunks(written.manifest)
    asked = foresee(
        written.manifest, table, wanted=Regions.of(boxes), can_read_into=lambda _: True, policy=ReadPolicy()
    )
    ranges = [at.num_bytes for _, at in asked]
    assert (report.num_bytes, report.num_requests) == (sum(ranges), len(ranges))


def test_columns_for_a_tensor_that_is_no_array_are_read_as_a_whole():
    store = Direct()
    bits = np.random.default_rng(1).integers(0, 2**63, (300, 200), np.uint64)
    written = write_cut(store, 1, {"c": ("complex64", bits)}, {"c": [Box.whole((300, 200))]})
    target = torch.zeros(300, 50, dtype=torch.complex64).conj()
    box = Box((0, 100), (300, 50))
    restore_into(store, [Wanted("c", "complex64", (300, 200), box, target)])
    found = target.resolve_conj().view(torch.int64).numpy().view(np.uint64)
    assert (found.reshape(300, 50) == bits[:, 100:150]).all() and store.num_plain == 1
    assert written.manifest.step == 1


class Tracked(bytearray):
    """Bytes that are counted for as long as anything holds them."""


class Count:
    """How many tracked bytes are held, and how many were at most."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def track(self, data: Any) -> Tracked:
        tracked = Tracked(data)
        self.held += len(tracked)
        self.most = max(self.most, self.held)
        weakref.finalize(tracked, self._drop, len(tracked))
        return tracked

    def _drop(self, num_bytes: int) -> None:
        self.held -= num_bytes


@given(seed=st.integers(0, 2**32), threads=st.integers(1, 4), rooms=st.integers(1, 9))
def test_what_is_held_at_a_time_stays_within_the_budget(seed, threads, rooms):
    chance = random.Random(seed)
    chunk = 4096
    store, count = MemoryStore(), Count()
    written = None
    for step in (1, 2, 3):
        tensors = {f"w{i}": grid((64 + i, 64), i + step) for i in range(4)}
        boxes = {name: split_box(Box.whole(bits.shape), 4, chunk) for name, (_, bits) in tensors.items()}
        manner = Manner(
            lambda: chance.choice(list(Codec)), 2, 1000, written if chance.random() < 0.8 else None
        )
        written = write_cut(store, step, tensors, boxes, manner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK_ROOM_BYTES", 8 * chunk)
        for name in ("decode", "xor_bytes"):
            undone = getattr(filling, name)
            patch.setattr(filling, name, lambda *given, undone=undone: count.track(undone(*given)))
        policy = ReadPolicy(num_threads=threads, budget_bytes=rooms * 8 * chunk)
        broken = Unsteady(
            store, lambda _, key, found: [count.track(one) for one in found] if "packs" in key else found
        )
        loaded = load(broken, policy=policy)
    assert loaded.manifest.step == 3 and 0 < count.most <= policy.budget_bytes
    del loaded
    assert count.held == 0


@pytest.mark.parametrize("codec", list(Codec))
def test_the_memory_of_a_restore_stays_within_its_budget(codec):
    store = MemoryStore()
    tensors = {f"w{i}": grid((4096, 1024), i + 3) for i in range(5)}
    boxes = {name: split_box(Box.whole(bits.shape), 4, 4 * MIB) for name, (_, bits) in tensors.items()}
    written = write_cut(store, 1, tensors, boxes, Manner(codec=lambda: codec))
    wanted = [want(written, name, Box((0, 0), (4096, 1024)))[0] for name in tensors]
    policy = ReadPolicy(budget_bytes=32 * MIB)
    copied = Unsteady(store, lambda _, key, found: [bytes(one) for one in found])
    tracemalloc.start()
    try:
        restore_into(copied, wanted, policy=policy)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most <= policy.budget_bytes + MIB
    assert all(is_filled(written, one) for one in wanted)


def test_a_budget_without_room_for_a_chunk_is_refused():
    with pytest.raises(ValueError, match="32 MiB"):
        ReadPolicy(budget_bytes=32 * MIB - 1)
    assert ReadPolicy(num_threads=8, budget_bytes=64 * MIB).num_readers == 2
