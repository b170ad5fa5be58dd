"""Which tensors share memory: as a count of every element's bytes says it, for any strides."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.overlaps import find_overlaps, overlaps_itself

NUM_BYTES = 512
DTYPES = [torch.uint8, torch.int16, torch.float32, torch.complex64]


@st.composite
def views(draw: st.DrawFn, buffer: torch.Tensor) -> torch.Tensor:
    typed = buffer.view(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    return typed.as_strided(shape, strides, draw(st.integers(0, 16)))


def bytes_of(view: torch.Tensor, base: int) -> list[int]:
    """List the bytes of each element in turn, counted from the buffer's first."""
    places = product(*map(range, view.shape))
    steps = [sum(at * stride for at, stride in zip(place, view.stride(), strict=True)) for place in places]
    firsts = [view.data_ptr() - base + step * view.itemsize for step in steps]
    return [first + byte for first in firsts for byte in range(view.itemsize)]


@given(st.data())
def test_tensors_overlap_exactly_if_they_have_a_byte_in_common(data):
    buffer = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    several = data.draw(st.lists(views(buffer), max_size=6))
    held = [set(bytes_of(view, buffer.data_ptr())) for view in several]
    expected = {
        one: [other for other in range(len(held)) if other != one and held[one] & held[other]]
        for one in range(len(held))
    }
    found = find_overlaps(several)
    assert {one: sorted(others) for one, others in found.items()} == {
        one: others for one, others in expected.items() if others
    }


@given(st.data())
def test_a_tensor_overlaps_itself_exactly_if_one_of_its_bytes_is_two(data):
    buffer = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    view = data.draw(views(buffer))
    places = bytes_of(view, buffer.data_ptr())
    assert overlaps_itself(view) is (len(set(places)) < len(places))


def test_of_very_many_that_interleave_it_is_taken_that_they_share_memory():
    few, many = torch.zeros(4, 64), torch.zeros(4, 100)
    assert find_overlaps([few[:, column] for column in range(64)]) == {}
    assert len(find_overlaps([many[:, column] for column in range(100)])) == 100


def test_what_lies_apart_is_not_listed():
    one = torch.zeros(4)
    assert find_overlaps([one, torch.zeros(4), one[3:]]) == {0: [2], 2: [0]}
