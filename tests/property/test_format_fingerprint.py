"""Fingerprints add up over any exact cover, agree with their definition, and see what may go wrong."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import FormatError, Unsupported
from checkpoint.format.dtypes import DTYPES, dtype_of
from checkpoint.format.fingerprint import MODULUS, fingerprint, fingerprint_many, fingerprint_run
from checkpoint.format.layout import Box, split_box

shapes = st.one_of(
    st.lists(st.integers(1, 9), max_size=4).map(tuple),
    st.tuples(st.integers(1, 4), st.integers(4000, 9000)),
    st.tuples(st.integers(4000, 70000)),
    st.tuples(st.integers(1, 40), st.sampled_from([1024, 4096])),
)
names = st.sampled_from(sorted(DTYPES))


def splitmix64_odd(index: int) -> int:
    z = (index + 0x9E3779B97F4A7C15) % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return (z ^ (z >> 31)) | 1


def by_definition(raw: bytes, name: str, shape: tuple[int, ...], box: Box) -> int:
    """The definition of docs/format.md, one byte of a word at a time."""
    itemsize = dtype_of(name).itemsize
    places = np.arange(np.prod(shape, dtype=int)).reshape(shape)[box.within(Box.whole(shape))].reshape(-1)
    elements = [raw[at : at + itemsize] for at in range(0, len(raw), itemsize)]
    total = 0
    for place, element in zip(places.tolist(), elements, strict=True):
        for at, byte in enumerate(element, place * itemsize):
            g = at // 4
            a, b = (
                splitmix64_odd((g % 4096 + 0x486F6C6466617374) % MODULUS),
                splitmix64_odd(g // 4096 + 0x636865636B707431),
            )
            total += byte * 256 ** (at % 4) * a * b
    return total % MODULUS


def random_bits(seed: int, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return the raw bytes of each element along a last dim of its own."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, dtype_of(name).itemsize), dtype=np.uint8)


@st.composite
def parts(draw, most=9):
    shape = draw(st.lists(st.integers(1, most), max_size=4).map(tuple))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, Box(start, tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, start, strict=True)))


@given(parts(), names, st.integers(0, 99))
def test_a_fingerprint_is_what_its_definition_says(part, name, seed):
    shape, box = part
    raw = random_bits(seed, box.size, name).tobytes()
    assert fingerprint(raw, name, shape, box) == by_definition(raw, name, shape, box)


@settings(max_examples=20)
@given(st.integers(4000, 4200), st.integers(1, 3), st.integers(0, 4100), st.integers(1, 9000), names)
def test_the_definition_holds_across_blocks_in_long_and_short_runs(width, height, start, length, name):
    box = Box((0, min(start, width - 1)), (height, max(1, min(length, width - start))))
    raw = random_bits(0, box.size, name).tobytes()
    assert fingerprint(raw, name, (height, width), box) == by_definition(raw, name, (height, width), box)


@pytest.mark.parametrize("name", ["uint8", "float32", "complex128"])
@pytest.mark.parametrize("length", [1, 9, 10, 11, 12, 600])
def test_the_definition_holds_where_a_row_just_meets_another_block(name: str, length: int):
    words = dtype_of(name).itemsize / 4
    box = Box((0, int(4096 / words) - 10), (2, length))
    raw = random_bits(0, box.size, name).tobytes()
    shape = (2, box.stop[1] + 904)
    assert fingerprint(raw, name, shape, box) == by_definition(raw, name, shape, box)


@settings(max_examples=60)
@given(shapes, names, st.integers(0, 99), st.data())
def test_the_shares_of_any_exact_cover_add_up_to_the_whole(shape, name, seed, data):
    bits = random_bits(seed, shape, name)
    whole = Box.whole(shape)
    cover = [whole]
    for _ in range(data.draw(st.integers(0, 6))):  # cut some box in two, anywhere, along any dim
        box = cover.pop(data.draw(st.integers(0, len(cover) - 1)))
        dims = [dim for dim, n in enumerate(box.size) if n > 1]
        if not dims:
            cover.append(box)
            continue
        dim = data.draw(st.sampled_from(dims))
        at = data.draw(st.integers(1, box.size[dim] - 1))
        first = Box(box.start, tuple(at if d == dim else n for d, n in enumerate(box.size)))
        start = tuple(a + at if d == dim else a for d, a in enumerate(box.start))
        rest = Box(start, tuple(n - at if d == dim else n for d, n in enumerate(box.size)))
        cover += [first, rest]
    shares = [fingerprint(bits[box.within(whole)].tobytes(), name, shape, box) for box in cover]
    assert sum(shares) % MODULUS == fingerprint(bits.tobytes(), name, shape, whole)


@pytest.mark.parametrize("shape", [(300_000,), (64, 5000), (700, 300), (4096, 100), (20, 70_000)])
def test_cutting_in_chunks_or_columns_changes_nothing(shape: tuple[int, ...]):
    bits = random_bits(3, shape, "float32")
    whole = Box.whole(shape)
    expected = fingerprint(bits.tobytes(), "float32", shape, whole)
    chunks = split_box(whole, 4, 50_000)
    half = shape[-1] // 2
    left = Box(whole.start, (*shape[:-1], half))
    right = Box((*whole.start[:-1], half), (*shape[:-1], shape[-1] - half))
    for cover in (chunks, [left, right]):
        shares = [fingerprint(bits[box.within(whole)].tobytes(), "float32", shape, box) for box in cover]
        assert sum(shares) % MODULUS == expected


@given(st.integers(0, 2**32), st.integers(2, 9000), names)
def test_a_flipped_bit_never_goes_unseen(seed, count, name):
    random = np.random.default_rng(seed)
    bits = random_bits(seed, (count,), name)
    before = fingerprint(bits.tobytes(), name, (count,), Box.whole((count,)))
    bits.reshape(-1)[random.integers(bits.size)] ^= 1 << int(random.integers(8))
    assert fingerprint(bits.tobytes(), name, (count,), Box.whole((count,))) != before


@pytest.mark.parametrize("count", [10, 4096, 20_000])
def test_flipped_signs_swaps_zeroed_blocks_and_shifts_are_seen(count: int):
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    whole = Box.whole((count,))

    def mark(array: np.ndarray) -> int:
        return fingerprint(array.astype(np.float32).tobytes(), "float32", (count,), whole)

    swapped, zeroed, two_signs = values.copy(), values.copy(), values.copy()
    swapped[[0, count - 1]] = swapped[[count - 1, 0]]
    zeroed[count // 2 :] = 0
    two_signs[[1, count // 2]] *= -1
    changed = [
        -values,
        swapped,
        zeroed,
        two_signs,
        np.roll(values, 1),
        np.roll(values, count // 2),
        values[::-1],
    ]
    assert len({mark(values), *map(mark, changed)}) == 1 + len(changed)


def test_the_same_numbers_at_another_place_have_another_fingerprint():
    raw = bytes(range(64))
    marks = {
        fingerprint(raw, "float32", (4096 * 3,), Box((start,), (16,))) for start in range(0, 4096 * 2, 16)
    }
    assert len(marks) == 512


@settings(max_examples=30)
@given(st.lists(st.tuples(parts(), names), max_size=12), st.integers(0, 99))
def test_many_fingerprints_are_those_of_each(found, seed):
    regions = [
        (random_bits(seed + place, box.size, name).tobytes(), name, shape, box)
        for (shape, part), name in found
        for place, box in enumerate((part, Box.whole(shape), Box.whole(shape)))
    ]
    large = (5000, 3)
    regions.append((random_bits(seed, large, "float32").tobytes(), "float32", large, Box.whole(large)))
    assert fingerprint_many(regions) == [fingerprint(*region) for region in regions]


def test_one_region_among_many_that_does_not_fit_is_refused():
    good, bad = ((bytes(n), "float32", (3,), Box.whole((3,))) for n in (12, 8))
    with pytest.raises(FormatError, match="8 bytes are not a box"):
        fingerprint_many([good, bad])


@pytest.mark.parametrize("name", ["uint8", "bfloat16", "float32", "complex128"])
@pytest.mark.parametrize("width", [1, 3, 40, 700, 2050, 9000])
def test_columns_that_begin_anywhere_add_up(name: str, width: int):
    shape = (9, 3 * width + 1)
    bits = random_bits(1, shape, name)
    cuts = [0, 1, width + 1, 3 * width + 1]
    boxes = [Box((0, a), (9, b - a)) for a, b in pairwise(cuts)]
    shares = [fingerprint(bits[box.within(Box.whole(shape))].tobytes(), name, shape, box) for box in boxes]
    assert sum(shares) % MODULUS == fingerprint(bits.tobytes(), name, shape, Box.whole(shape))


def test_a_fingerprint_tells_bytes_and_places_apart_but_not_dtypes():
    raw = bytes(range(96))
    marks = {
        fingerprint(raw, name, (96 // dtype.itemsize,), Box.whole((96 // dtype.itemsize,)))
        for name, dtype in DTYPES.items()
    }
    assert len(marks) == 1


def test_an_empty_region_adds_nothing():
    assert fingerprint(b"", "float32", (0, 3), Box.whole((0, 3))) == 0
    assert fingerprint(b"", "float32", (5, 3), Box((2, 1), (0, 2))) == 0


def test_every_kind_of_buffer_has_the_fingerprint_of_its_bytes():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    raw, box = values.tobytes(), Box.whole((3, 4))
    expected = fingerprint(raw, "float32", (3, 4), box)
    for data in (values, bytearray(raw), memoryview(raw), np.frombuffer(raw, np.uint8)):
        assert fingerprint(data, "float32", (3, 4), box) == expected


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="8 bytes are not a box"):
        fingerprint(bytes(8), "float32", (3,), Box.whole((3,)))
    with pytest.raises(FormatError, match="7 bytes are not a box"):
        fingerprint(bytes(7), "float32", (3,), Box.whole((3,)))
    with pytest.raises(FormatError, match="does not lie within"):
        fingerprint(bytes(12), "float32", (3,), Box((1,), (3,)))
    with pytest.raises(FormatError, match="contiguous"):
        fingerprint(np.zeros((4, 4), np.float32)[:, :2], "float32", (4, 2), Box.whole((4, 2)))
    with pytest.raises(Unsupported, match="float33"):
        fingerprint(bytes(12), "float33", (3,), Box.whole((3,)))


@pytest.mark.parametrize("first", [0, 4, 16 << 10, (5 << 14) + 12])
def test_many_blocks_at_once_have_the_sum_of_words_taken_a_few_at_a_time(first: int):
    words = np.random.default_rng(first).integers(0, 2**32, 300 * 4096 + 17, np.uint32)
    parts = [
        fingerprint_run(words[at : at + 1000].tobytes(), first + 4 * at) for at in range(0, len(words), 1000)
    ]
    assert fingerprint_run(words.data.cast("B"), first) == sum(parts) % MODULUS
