"""Compiled code gives the fingerprints that numpy gives, and without it numpy does all the work."""

import _ctypes
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.format import compiled, fingerprint, summing
from checkpoint.format.box import Box
from checkpoint.format.runs import Runs
from tests.summings import SOURCE, WAYS, build, summing_by

POOL = np.frombuffer(random.Random(1).randbytes(1 << 18), np.uint8)
BLOCK_BYTES = 16384

places = st.one_of(
    st.integers(0, 3 * BLOCK_BYTES),
    st.integers(BLOCK_BYTES - 20, BLOCK_BYTES + 20),
    st.integers(1, 1 << 40).map(lambda block: block * BLOCK_BYTES - 7),
)


@given(st.integers(0, 130), st.one_of(st.integers(0, 40), st.integers(0, 100_000)), places)
def test_a_run_that_lies_anywhere_in_memory_and_in_its_tensor_has_one_fingerprint(begin, num_bytes, first):
    raw = POOL[begin : begin + num_bytes]
    assert summing_by("compiled code").sum_run(raw, first) == summing.sum_run(raw, first)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 7), max_size=2),
    st.one_of(st.integers(1, 300), st.integers(4000, 20_000), st.just(4096)),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 3),
    st.data(),
)
def test_rows_that_begin_at_the_same_or_at_other_places_of_blocks_have_one_sum(
    outer, width, itemsize, begin, data
):
    shape = (*outer, width // itemsize + 1)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(start, tuple(data.draw(st.integers(1, n - a)) for n, a in zip(shape, start, strict=True)))
    runs = Runs.of(shape, box, itemsize)
    raw = np.resize(POOL, begin + box.numel * itemsize)[begin:]
    assert summing_by("compiled code").sum_runs(raw, runs) == summing.sum_runs(raw, runs)


@given(st.integers(0, 5), st.integers(0, 90_000), places, st.integers(1, 30_000))
def test_stretches_have_the_same_fingerprints_both_ways(begin, num_bytes, first, length):
    raw, length = POOL[begin : begin + num_bytes], max(length, num_bytes // 50)
    found = summing_by("compiled code").sum_stretches(raw, first, length)
    assert found == summing.sum_stretches(raw, first, length)


@given(st.integers(1, 40), st.one_of(st.integers(1, 50), st.integers(1, BLOCK_BYTES)))
def test_small_tensors_have_the_same_fingerprints_both_ways(count, num_bytes):
    rows = np.resize(POOL, (count, num_bytes))
    assert summing_by("compiled code").sum_small(rows) == summing.sum_small(rows)


def test_more_rows_than_are_listed_at_a_time_are_all_counted():
    box = Box((0, 1), (150_000, 1))
    runs = Runs.of((150_000, 2), box, 1)
    raw = POOL[: box.numel]
    assert summing_by("compiled code").sum_runs(raw, runs) == summing.sum_runs(raw, runs)


def test_threads_do_not_disturb_each_other():
    sums = summing_by("compiled code")
    expected = summing.sum_run(POOL, 12)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: sums.sum_run(POOL, 12), range(400))) == {expected}


@pytest.mark.parametrize("widest", [1, 8, 16])
def test_narrower_processors_make_the_same_sums(widest: int):
    sums = compiled.load_compiled(str(build(SOURCE.read_text("utf-8"), f"-DWIDEST={widest}")))
    assert sums is not None
    sizes = (0, 1, 5, 31, 32, 63, 64, 67, 100, 4099, *(blocks * BLOCK_BYTES + 9 for blocks in range(1, 11)))
    for num_bytes in sizes:
        for first in (0, 1, 4, BLOCK_BYTES - 36, BLOCK_BYTES - 2):
            raw = POOL[first % 7 :][:num_bytes]
            assert len(raw) == num_bytes
            assert sums.sum_run(raw, first) == summing.sum_run(raw, first)


@pytest.mark.parametrize("way", WAYS)
def test_either_way_makes_all_fingerprints_and_says_so(way: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "_sums", summing_by(way))
    values = np.arange(9 * 5000, dtype="<u4").reshape(9, 5000)
    whole, left, right = Box.whole((9, 5000)), Box((0, 0), (9, 1234)), Box((0, 1234), (9, 3766))
    shares = [
        fingerprint.fingerprint(np.ascontiguousarray(values[box.within(whole)]), "uint32", (9, 5000), box)
        for box in (left, right)
    ]
    assert fingerprint.fingerprinted_by() == way
    assert fingerprint.fingerprint(values, "uint32", (9, 5000), whole) == sum(shares) % fingerprint.MODULUS
    small = (values[0, :3].tobytes(), "uint32", (3,), Box.whole((3,)))
    assert fingerprint.fingerprint_many([small, small]) == [fingerprint.fingerprint(*small)] * 2


def test_where_nothing_was_compiled_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_LIBRARY", "checkpoint.format._was_not_built")
    assert compiled.find_compiled() is None


def test_a_file_that_is_no_such_library_is_not_used():
    assert compiled.load_compiled(str(Path(__file__))) is None
    assert compiled.load_compiled(_ctypes.__file__) is None


def test_a_library_that_gives_other_sums_is_not_used():
    source = SOURCE.read_text("utf-8")
    assert compiled.load_compiled(str(build(source))) is not None
    wrong = source.replace("0x94D049BB133111EBu", "0x94D049BB133111ECu")
    assert wrong != source and compiled.load_compiled(str(build(wrong))) is None
