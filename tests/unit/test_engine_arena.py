"""The arena lends what it has, to one at a time, and never more."""

import os
from itertools import pairwise

import pytest

from checkpoint import ArenaFull
from checkpoint.engine.arena import ALIGNMENT, Arena, map_arena


def test_regions_are_aligned_and_do_not_overlap():
    arena = Arena(1 << 16)
    regions = [arena.reserve(size) for size in (1, 63, 64, 65, 1000)]
    assert all(region is not None and region.offset % ALIGNMENT == 0 for region in regions)
    taken = sorted((region.offset, region.stop) for region in regions if region)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))


def test_a_released_gap_is_lent_again_before_the_end_is():
    arena = Arena(1 << 12)
    first, second, third = (arena.reserve(1 << 10) for _ in range(3))
    assert first and second and third
    arena.release(second)
    assert arena.reserve(1 << 10) == second


def test_a_full_arena_lends_nothing_until_something_comes_back():
    arena = Arena(1 << 12)
    whole = arena.reserve(1 << 12)
    assert whole is not None and arena.reserve(1) is None
    arena.release(whole)
    assert arena.num_lent_bytes == 0 and arena.reserve(1) is not None


def test_what_could_never_fit_is_refused_with_sizes_and_the_setting_to_raise():
    with pytest.raises(ArenaFull, match=r"9 MiB.*1 MiB.*checkpoint\.arena_mib"):
        Arena(1 << 20).reserve(9 << 20)


def test_another_mapping_of_the_same_file_sees_the_same_bytes():
    arena = Arena(1 << 12)
    region = arena.reserve(100)
    assert region is not None
    arena.view(region)[:4] = b"abcd"
    other = map_arena(os.dup(arena.fd), arena.num_bytes)
    assert other[region.offset : region.offset + 4] == b"abcd"
