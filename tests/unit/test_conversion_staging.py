"""Rows that are read together take their own memory once, and what threads turn besides."""

import tracemalloc

import numpy as np

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.box import Box
from checkpoint.interop.conversion.outbound import BAND_BYTES, NUM_BANDS, Outbound
from checkpoint.interop.formats.contract import About
from checkpoint.interop.moves import Foreign, How, Move, Plan

SIDE = 4096
SQUARE = Box((0, 0), (SIDE, SIDE))


class Square:
    """A source of one square tensor, whose boxes are read as copies."""

    def __init__(self) -> None:
        self.tensors = (TensorSpec("w", "int32", (SIDE, SIDE)),)
        self.values = np.arange(SIDE * SIDE, dtype="<u4").reshape(SIDE, SIDE)

    def read(self, wishes):
        return [self.values[tuple(map(slice, box.start, box.stop))].copy() for _, box in wishes]


def test_a_large_box_that_lies_transposed_is_filled_without_a_second_of_its_size():
    source = Square()
    plan = Plan(
        (Foreign("w", "int32", (SIDE, SIDE)),),
        source.tensors,
        (Move(0, SQUARE, (1, 0), 0, SQUARE, How.FILL),),
        (),
        (),
    )
    outbound = Outbound(source, plan, About("made"))
    tracemalloc.start()
    try:
        found = outbound.filled(0, SQUARE, 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, source.values.T)
    assert most <= found.nbytes + NUM_BANDS * BAND_BYTES - (1 << 20)
