"""Fingerprints taken in passing are those of a pass of their own, whatever was read, and how often."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.account import account_as_named
from checkpoint.interop.conversion.assembling import Assembled
from checkpoint.interop.conversion.casting import Reach
from checkpoint.interop.conversion.marking import Marked
from checkpoint.interop.moves import Foreign
from tests.interop_samples import fingerprints
from tests.property.test_conversion_boxes import SETTINGS, Arrays, accounted, boxes, planned
from tests.unit.test_interop_builtin import MATRIX

NAME, SHAPE = "w", (6, 4)
FOREIGN = [Foreign(NAME, "float32", SHAPE)]
ACCOUNT = account_as_named(dict(enumerate(FOREIGN)), {0: NAME})
NUM_BYTES = 4 * 6 * 4


def source() -> Arrays:
    return Arrays(FOREIGN, [np.arange(24, dtype=np.uint32).reshape(SHAPE)])


@pytest.mark.parametrize("case", range(1, len(MATRIX), 3))
@settings(max_examples=10)
@given(data=st.data())
def test_whatever_was_read_in_passing_the_fingerprints_are_those_of_the_tensors(case, data):
    tensors, plan, shards = planned(case)
    marked = Marked(Arrays(plan.foreign, shards), accounted(case))
    assembled = Assembled(marked, plan)
    for number in data.draw(st.lists(st.integers(0, len(plan.tensors) - 1), max_size=6)):
        whole = Box.whole(plan.tensors[number].shape)
        box = data.draw(st.one_of(st.just(whole), boxes(whole.size)))
        assembled.read([(number, box)])
    assert marked.fingerprints(set(tensors), SETTINGS, Reach()) == fingerprints(tensors)


def test_what_was_read_whole_is_not_read_again_and_what_was_not_is():
    halves = [Box((0, 0), (3, 4)), Box((3, 0), (3, 4))]
    for read, expected in ((halves, 1), ([*halves, halves[0]], 1.5), (halves[:1], 1.5), ([], 1)):
        marked = Marked(source(), ACCOUNT)
        for box in read:
            marked.read(0, box)
        expected_marks = fingerprints({NAME: source().arrays[0]})
        assert marked.fingerprints({NAME}, SETTINGS, Reach()) == expected_marks
        assert marked.num_read_bytes == expected * NUM_BYTES


def test_parts_that_overlap_are_no_whole_even_if_they_are_as_many():
    marked = Marked(source(), ACCOUNT)
    for box in (Box((0, 0), (4, 4)), Box((3, 0), (2, 4))):
        marked.read(0, box)
    assert marked.fingerprints({NAME}, SETTINGS, Reach()) == fingerprints({NAME: source().arrays[0]})
    assert marked.num_read_bytes == 2 * NUM_BYTES


def test_a_source_that_changes_while_it_is_read_is_told():
    arrays = source()
    marked = Marked(arrays, ACCOUNT)
    marked.read(0, Box.whole(SHAPE))
    arrays.arrays[0][2, 2] ^= 1
    with pytest.raises(Mismatch, match="w changed while"):
        marked.read(0, Box.whole(SHAPE))
