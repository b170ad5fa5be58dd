"""Blocks of chunks: how they are cut, what their sums are, and where a pack keeps them."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.format.blocks import (
    BLOCK_BYTES,
    SUM_BYTES,
    blocks_of,
    digest_many,
    read_sums,
    sums_of,
    total_of,
)
from checkpoint.format.codec import Codec, checksum
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import fingerprint, fingerprint_run, fingerprint_stretches
from checkpoint.format.layout import Box
from checkpoint.format.pack import PackBuilder, PackedTensor
from checkpoint.format.records import ChunkRecord

SHAPES = [(70_000,), (5, 40_000), (1, 3, 30_000), (300, 301), (2, 1, 70_001), (9, 50, 123)]


@st.composite
def contiguous_boxes(draw):
    """A tensor and a box of it whose elements lie side by side: some rows of its first real dim."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "float64"]))
    dim = next(number for number, size in enumerate(shape) if size > 1)
    start = draw(st.integers(0, shape[dim] - 1))
    size = draw(st.integers(1, shape[dim] - start))
    at = [0] * len(shape)
    at[dim] = start
    return dtype, shape, Box(tuple(at), (*shape[:dim], size, *shape[dim + 1 :]))


def raw_of(dtype: str, box: Box) -> bytes:
    return random.Random(1).randbytes(box.numel * itemsize(dtype))


@given(contiguous_boxes())
def test_each_sum_is_the_fingerprint_of_its_block_and_all_of_them_add_up_to_the_chunks(given_box):
    dtype, shape, box = given_box
    raw, blocks = raw_of(dtype, box), blocks_of(dtype, shape, box)
    sums = sums_of(raw, dtype, shape, box)
    if blocks is None:
        assert sums == b"" and (len(raw) <= BLOCK_BYTES or max(box.size) == 1)
        return
    assert len(sums) == blocks.sums_bytes == SUM_BYTES * blocks.count
    at = 0
    for number, found in enumerate(read_sums(sums).tolist()):
        part = blocks.box(box, number, number + 1)
        num_bytes = part.numel * itemsize(dtype)
        assert num_bytes <= BLOCK_BYTES or part.size[blocks.dim] == 1
        assert found == fingerprint(raw[at : at + num_bytes], dtype, shape, part)
        at += num_bytes
    assert at == len(raw)
    assert total_of(read_sums(sums)) == fingerprint(raw, dtype, shape, box)
    assert digest_many([(raw, dtype, shape, box)]) == [(total_of(read_sums(sums)), sums)]


@given(st.integers(0, 90_000), st.integers(0, 70_000), st.integers(1, 30_000))
def test_stretches_are_fingerprinted_as_if_each_were_alone(num_bytes, first, length):
    raw = random.Random(num_bytes).randbytes(num_bytes)
    length = max(length, num_bytes // 50)
    alone = [fingerprint_run(raw[at : at + length], first + at) for at in range(0, num_bytes, length)]
    assert fingerprint_stretches(raw, first, length) == alone
    aligned = [fingerprint_run(raw[: num_bytes // 4 * 4][at : at + 4 * length], 4 * first + at)
               for at in range(0, num_bytes // 4 * 4, 4 * length)]  # fmt: skip
    assert fingerprint_stretches(raw[: num_bytes // 4 * 4], 4 * first, 4 * length) == aligned


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((BLOCK_BYTES,), Box.whole((BLOCK_BYTES,))),
        ((1000, 1000), Box((0, 0), (1000, 500))),
        ((2, 1 << 20), Box((0, 0), (2, 1 << 19))),
    ],
)
def test_a_small_chunk_and_a_scattered_one_have_no_sums(shape, box):
    assert blocks_of("uint8", shape, box) is None
    assert sums_of(bytes(box.numel), "uint8", shape, box) == b""


def test_the_sums_of_the_example_in_the_format_are_those():
    raw = np.arange(1 << 16, dtype="<u4").tobytes()
    sums = sums_of(raw, "float32", (1 << 16,), Box.whole((1 << 16,)))
    assert sums.hex() == "a041a65f320c9ec19055a17d1ba55892"


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.ZSTD])
def test_a_pack_keeps_the_sums_behind_a_raw_chunk_only(codec):
    shape = (1000, 100)
    box, raw = Box.whole(shape), raw_of("float32", Box.whole(shape))
    sums = sums_of(raw, "float32", shape, box)
    assert len(sums) == math.ceil(1000 / (BLOCK_BYTES // 400)) * SUM_BYTES
    builder = PackBuilder(1, "h", 0)
    chunk = ChunkRecord(0, box, codec, 0, 0, 0, checksum(raw), 1, sums=sums)
    placed = [builder.add(chunk, raw), builder.add(chunk, raw)]
    pack = bytes(builder.seal([PackedTensor("t", "float32", shape)]))
    behind = [pack[one.offset + one.num_bytes :][: len(sums)] == sums for one in placed]
    assert behind == [codec is Codec.RAW] * 2
    assert all(one.offset % 64 == 0 and pack[one.offset :][: len(raw)] == raw for one in placed)
