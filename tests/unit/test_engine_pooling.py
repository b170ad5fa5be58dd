"""Chunks that several ranks read in parts: each reads what it wants, and all of them prove the chunk."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from checkpoint.engine import rows
from checkpoint.engine.pooling import Pool, find_unproved
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import RestoreReport, restore_into
from checkpoint.engine.rows import LOT, find_reader
from checkpoint.engine.targets import Wanted
from checkpoint.errors import Corrupt
from checkpoint.format.fingerprint import fingerprint, fingerprinted_by
from checkpoint.format.layout import Box
from checkpoint.store.local import LocalStore
from tests.restore_samples import Bits, Written, random_bits, write_cut

ROWS, WIDTH = 512, 1024
WHOLE = Box.whole((ROWS, WIDTH))
CHUNKS = [Box((first, 0), (128, WIDTH)) for first in range(0, ROWS, 128)]
COLUMNS = [Box((0, 0), (ROWS, 300)), Box((0, 300), (ROWS, WIDTH - 300))]
LAYOUTS = {
    "columns": COLUMNS,
    "rows": [Box((0, 0), (200, WIDTH)), Box((200, 0), (ROWS - 200, WIDTH))],
    "both": [Box((a, b), (size, 512)) for a, size in ((0, 333), (333, ROWS - 333)) for b in (0, 512)],
    "columns too narrow to be read alone": [Box((0, 0), (ROWS, 9)), Box((0, 9), (ROWS, WIDTH - 9))],
}

pytestmark = pytest.mark.skipif(fingerprinted_by() == "numpy", reason="no compiled code here")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def write(store: LocalStore) -> Written:
    bits = random_bits(random.Random(1), "float32", (ROWS, WIDTH))
    return write_cut(store, 1, {"w": ("float32", bits)}, {"w": CHUNKS})


def bits_in(written: Written, box: Box) -> Bits:
    found: Bits = written.tensors["w"][1].view("<u4")[box.within(WHOLE)]
    return found


def flip(store: LocalStore, written: Written, chunk: Box, at: int) -> None:
    """Damage a byte of a chunk."""
    record, pack = written.records["w", chunk]
    data = bytearray(store.read(pack.key)[0])
    data[record.offset + at] ^= 4
    store.put(pack.key, data)


def read_apart(
    store: LocalStore, boxes: Sequence[Box]
) -> tuple[list[torch.Tensor], list[Pool], list[RestoreReport]]:
    """Let each of some ranks read its box."""
    tensors = [torch.zeros(box.size) for box in boxes]
    pools = [Pool() for _ in boxes]
    reports = [
        restore_into(
            store, [Wanted("w", "float32", (ROWS, WIDTH), box, tensor)], policy=ReadPolicy(pool=pool)
        ).report
        for box, tensor, pool in zip(boxes, tensors, pools, strict=True)
    ]
    return tensors, pools, reports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_read_what_they_want_and_prove_all_of_it_together(store, layout: str):
    written, boxes = write(store), LAYOUTS[layout]
    tensors, pools, reports = read_apart(store, boxes)
    for box, tensor in zip(boxes, tensors, strict=True):
        assert np.array_equal(tensor.numpy().view("<u4"), bits_in(written, box))
    assert find_unproved([pool.told() for pool in pools]) == []
    if "narrow" not in layout:
        assert [one.num_bytes for one in reports] == [tensor.nbytes for tensor in tensors]


@pytest.mark.parametrize("column", [0, 299, 300, WIDTH - 1])
def test_a_flipped_bit_is_found_whoever_read_it_and_its_chunk_is_named(store, column: int):
    flip(store, write(store), CHUNKS[2], (7 * WIDTH + column) * 4)
    _, pools, _ = read_apart(store, COLUMNS)
    assert find_unproved([pool.told() for pool in pools]) == [(0, 2 * CHUNKS[2].numel * 4)]
    with pytest.raises(Corrupt, match="'w'"):
        restore_into(
            store, [Wanted("w", "float32", (ROWS, WIDTH), COLUMNS[0], torch.zeros(ROWS, 300))], step=1
        )


def test_a_part_that_nobody_tells_of_or_that_is_told_twice_proves_nothing(store):
    write(store)
    _, (left, right), _ = read_apart(store, COLUMNS)
    places = [(0, first * WIDTH * 4) for first in range(0, ROWS, 128)]
    assert find_unproved([left.told()]) == places
    assert find_unproved([left.told(), right.told(), right.told()]) == places
    assert find_unproved([]) == []


def test_who_reads_chunks_in_another_way_tells_of_its_parts_as_well(store, monkeypatch):
    written = write(store)
    _, (left, _), _ = read_apart(store, COLUMNS)
    monkeypatch.setattr("checkpoint.engine.straight.find_reader", lambda: None)
    tensors, (_, right), _ = read_apart(store, COLUMNS)
    assert find_unproved([left.told(), right.told()]) == []
    assert np.array_equal(tensors[1].numpy().view("<u4"), bits_in(written, COLUMNS[1]))


def test_rows_are_read_where_they_lie_and_a_file_that_ends_early_is_told(tmp_path):
    raw = np.frombuffer(random.Random(2).randbytes(5 * 4096), np.uint8)
    (tmp_path / "file").write_bytes(raw.tobytes())
    reader = find_reader()
    assert reader is not None
    memory = np.zeros((5, 700), np.uint8)
    with (tmp_path / "file").open("rb") as file:
        lot = (file.fileno(), 10, 4096, memory.ctypes.data, 700, 10, 4096, 5, 600)
        short = (file.fileno(), 4 * 4096, 4096, memory.ctypes.data, 700, 10, 4096, 2, 600)
        sums, is_read = reader.read(np.array([short, lot], LOT))
    assert is_read.tolist() == [False, True]
    wanted = raw.reshape(5, 4096)[:, 10:610]
    assert np.array_equal(memory[:, :600], wanted) and not memory[:, 600:].any()
    assert int(sums[1]) == fingerprint(
        np.ascontiguousarray(wanted), "uint8", (5, 4096), Box((0, 10), (5, 600))
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("_LIBRARY", "checkpoint.engine._was_not_built"), ("_FIELDS", "as another version had them")],
)
def test_without_the_library_of_these_sources_there_is_no_reader(monkeypatch, name, value):
    monkeypatch.setattr(rows, name, value)
    find_reader.cache_clear()
    try:
        assert find_reader() is None
    finally:
        find_reader.cache_clear()
