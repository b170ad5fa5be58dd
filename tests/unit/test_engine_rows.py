"""Rows of files, read and fingerprinted by compiled code: by calls or through a mapping, all the same."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.rows import LOT, Lots, find_reader
from checkpoint.engine.straight import _batches
from checkpoint.format.fingerprint import MODULUS, fingerprint_run

PAGE = mmap.PAGESIZE
READER = find_reader()
pytestmark = pytest.mark.skipif(READER is None, reason="no C compiler was at hand")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pack"
    path.write_bytes(np.random.default_rng(7).bytes(9 << 20))
    return path


def lot_of(
    file: int, memory: np.ndarray, *, offset: int, step: int, stride: int, rows: tuple[int, int]
) -> Lots:
    lots = np.zeros(1, LOT)
    address, (num_rows, row_bytes) = memory.ctypes.data, rows
    lots[0] = (file, offset, step, address, stride, offset, step, num_rows, row_bytes)
    return lots


def check(path: Path, *, offset: int, step: int, row_bytes: int, num_rows: int, stride: int) -> None:
    memory = np.zeros((num_rows, stride), np.uint8)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        rows = (num_rows, row_bytes)
        lots = lot_of(descriptor, memory, offset=offset, step=step, stride=stride, rows=rows)
        assert READER is not None
        sums, is_read = READER.read(lots)
    finally:
        os.close(descriptor)
    places = offset + np.arange(num_rows) * step
    is_there = int(places[-1]) + row_bytes <= len(data)
    assert is_read.tolist() == [is_there]
    if is_there:
        wanted = np.stack([data[place : place + row_bytes] for place in places])
        assert np.array_equal(memory[:, :row_bytes], wanted)
        assert not memory[:, row_bytes:].any(), "what lies between rows in memory is not touched"
        total = sum(fingerprint_run(row.tobytes(), int(at)) for row, at in zip(wanted, places, strict=True))
        assert int(sums[0]) % MODULUS == total % MODULUS


@given(
    offset=st.integers(0, 3 * PAGE),
    row_bytes=st.integers(1, PAGE),
    gap=st.sampled_from([1, 8, PAGE // 2, PAGE - 1, PAGE, 2 * PAGE]),
    num_rows=st.integers(1, 300),
    spare=st.sampled_from([0, 5]),
)
def test_rows_are_what_the_file_has_however_far_apart(file, offset, row_bytes, gap, num_rows, spare):
    check(
        file,
        offset=offset,
        step=row_bytes + gap,
        row_bytes=row_bytes,
        num_rows=num_rows,
        stride=row_bytes + spare,
    )


@pytest.mark.parametrize(
    ("row_bytes", "step"), [(PAGE // 2, PAGE), (1, PAGE), (1000, 1033), (PAGE - 1, PAGE)]
)
@pytest.mark.parametrize("offset", [0, 1, PAGE + 17])
def test_many_rows_go_through_several_windows(file, row_bytes, step, offset):
    num_rows = (9 * (1 << 20) - offset - row_bytes) // step + 1
    check(file, offset=offset, step=step, row_bytes=row_bytes, num_rows=num_rows, stride=row_bytes)


@pytest.mark.parametrize("missing", [1, PAGE, 5 << 20])
def test_rows_that_a_file_lacks_are_told_and_end_no_process(tmp_path, file, missing):
    path = tmp_path / "short"
    path.write_bytes(file.read_bytes()[: (9 << 20) - missing])
    num_rows = (9 << 20) // PAGE
    check(path, offset=PAGE // 2, step=PAGE, row_bytes=PAGE // 2, num_rows=num_rows, stride=PAGE)


def test_a_thread_holds_few_files_open_however_small_they_are():
    lots = np.zeros(300, LOT)
    lots["num_rows"], lots["row_bytes"] = 1, 512
    packs = np.arange(300)[::-1] * 3
    batches = list(_batches(lots, packs))
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(300))
    assert max(len(np.unique(packs[batch])) for batch in batches) == 64
