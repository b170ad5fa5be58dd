"""Memory that is lent: no larger than what is kept in it, as thousands of small parts may be."""

import numpy as np
import pytest

from checkpoint.format import scratch
from checkpoint.format.scratch import lend


def lent_bytes(memory: memoryview) -> int:
    """Return how much memory a lent part holds back."""
    lent = memory.obj
    assert isinstance(lent, np.ndarray)
    return lent.nbytes if lent.base is None else lent.base.nbytes


@pytest.mark.parametrize("before", [None, 300 << 10, 1 << 20, 4 << 20])
@pytest.mark.parametrize("num_bytes", [1, 1 << 10, 300 << 10, 1 << 20, 5 << 20])
def test_nobody_holds_much_more_than_he_asked_for(before, num_bytes):
    if before:
        lend(before)  # and gives it back
    memory = lend(num_bytes)
    assert memory.nbytes == num_bytes <= lent_bytes(memory) <= 1.25 * num_bytes


def test_what_was_given_back_is_lent_again_and_to_one_at_a_time():
    scratch._kept.clear()
    first = lend(1 << 20)
    address = np.frombuffer(first, np.uint8).ctypes.data
    other = lend(1 << 20)
    assert np.frombuffer(other, np.uint8).ctypes.data != address
    del first
    again = lend((1 << 20) - 100)
    assert np.frombuffer(again, np.uint8).ctypes.data == address


def test_a_part_of_it_holds_all_of_it():
    scratch._kept.clear()
    part = lend(1 << 20)[10:20]
    address = np.frombuffer(part, np.uint8).ctypes.data
    assert np.frombuffer(lend(1 << 20), np.uint8).ctypes.data + 10 != address
