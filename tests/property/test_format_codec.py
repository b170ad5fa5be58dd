"""Codecs give back what they were given, whatever it is, and refuse all that is not as it was stored."""

import contextlib
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Corrupt
from checkpoint.format.codec import Codec, decode, encode, xor_bytes
from checkpoint.format.dtypes import DTYPES, itemsize
from checkpoint.format.frames import compress_by_entropy
from checkpoint.format.planes import PLANE_WIDTHS
from checkpoint.format.uppers import Packing, decode_uppers

names = st.sampled_from(sorted(DTYPES))
floats = st.sampled_from(sorted(PLANE_WIDTHS))
CHUNK_BYTES = 4 << 20


def random_floats(seed: int, count: int, name: str, *, zeros: float = 0.0, spread: float = 1.0) -> bytes:
    """Make numbers as weights are, in the bits of a dtype: some are zero, `spread` widens the exponents."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(count) * 10.0 ** random.normal(-2, 2 * (spread - 1) + 1e-9, count)
    values[random.random(count) < zeros] = 0
    with np.errstate(over="ignore"):
        if name == "bfloat16":
            return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return values.astype(f"<f{PLANE_WIDTHS[name]}").tobytes()


@given(st.sampled_from(Codec), names, st.binary(max_size=2000), st.integers(-3, 9))
def test_a_codec_gives_back_what_it_was_given(codec, name, data, level):
    used, stored = encode(codec, data, level, dtype=name)
    for kind in (bytes, bytearray, memoryview):
        assert bytes(decode(used, kind(stored), len(data))) == data


@settings(max_examples=80)
@given(st.integers(0, 2**32), st.integers(1, 70_000), names, st.sampled_from([0, 0, 0.3, 1]), st.floats(1, 9))
def test_planes_give_back_numbers_of_every_dtype(seed, count, name, zeros, spread):
    kind = name if name in PLANE_WIDTHS else "float32"
    raw = random_floats(seed, count, kind, zeros=zeros, spread=spread)
    raw = raw[: len(raw) // itemsize(name) * itemsize(name)]
    used, stored = encode(Codec.PLANES, raw, dtype=name)
    assert memoryview(stored).nbytes <= len(raw)
    assert bytes(decode(used, stored, len(raw))) == raw


@pytest.mark.parametrize("count", [2048, 2049, 65535, 65536, 65537, 131072, 140001])
@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("bits", ["zeros", "ones", "ascending", "noise", "one exponent", "all exponents"])
def test_planes_give_back_the_strangest_numbers(count: int, name: str, bits: str):
    width = PLANE_WIDTHS[name]
    places = np.arange(count, dtype="<u8")
    noise = np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64)
    numbers = {
        "zeros": places * 0,
        "ones": ~(places * 0),
        "ascending": places,
        "noise": noise,
        "one exponent": noise >> np.uint64(66 - 8 * width + 10) if width < 8 else noise >> np.uint64(12),
        "all exponents": places << np.uint64(8 * width - 9),
    }[bits]
    raw = numbers.astype(f"<u{width}").tobytes()
    used, stored = encode(Codec.PLANES, raw, dtype=name)
    assert bytes(decode(used, stored, len(raw))) == raw


@pytest.mark.parametrize(("name", "most"), [("bfloat16", 0.69), ("float32", 0.85), ("float16", 0.9)])
def test_planes_are_smaller_than_zstandard_alone(name: str, most: float):
    raw = random_floats(1, CHUNK_BYTES // itemsize(name), name)
    _, planes = encode(Codec.PLANES, raw, dtype=name)
    _, plain = encode(Codec.ZSTD, raw, dtype=name)
    assert len(planes) <= most * len(raw)
    assert len(planes) < 0.95 * len(plain)


def test_a_delta_of_adjacent_weights_is_far_smaller_than_they_are():
    before = np.frombuffer(random_floats(1, 1 << 20, "float32"), "<f4")
    after = before + np.random.default_rng(2).choice([0, 2e-5, -2e-5], before.size, p=[0.5, 0.25, 0.25])
    raws = [(each.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes() for each in (before, after)]
    delta = xor_bytes(raws[1], raws[0])
    used, stored = encode(Codec.PLANES, delta, dtype="bfloat16")
    assert len(stored) < 0.25 * len(raws[0])
    assert bytes(xor_bytes(decode(used, stored, len(raws[0])), raws[0])) == raws[1]


def test_a_delta_needs_a_base_of_its_own_length():
    with pytest.raises(Corrupt, match="4 bytes cannot be a delta against 5"):
        xor_bytes(bytes(4), bytes(5))


@given(st.sampled_from(Codec), names, st.integers(0, 2**32))
def test_the_given_buffer_is_never_written_to(codec, name, seed):
    data = bytearray(random_floats(seed, 4096, "float64"))
    before = bytes(data)
    _, stored = encode(codec, memoryview(data).toreadonly(), dtype=name)
    encode(codec, data, dtype=name)
    assert data == before
    decode(*encode(codec, data, dtype=name), len(data))
    assert data == before
    if stored is not data:
        bytes(stored)


@pytest.mark.parametrize("codec", [Codec.PLANES, Codec.ZSTD])
@pytest.mark.parametrize("name", ["uint8", "int64", "bool", "float8_e4m3fn", "float32", "bfloat16"])
def test_what_does_not_shrink_is_stored_as_it_is(name: str, codec: Codec):
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    used, stored = encode(codec, noise, dtype=name)
    assert used is Codec.RAW
    assert stored is noise


def test_integers_that_repeat_shrink_too():
    raw = (np.arange(100_000, dtype="<i8") // 7).tobytes()
    used, stored = encode(Codec.PLANES, raw, dtype="int64")
    assert used is Codec.ZSTD
    assert len(stored) < 0.5 * len(raw)


@given(st.sampled_from(Codec), st.binary(max_size=200), st.integers(0, 400))
def test_content_of_another_length_is_corrupt(codec, data, length):
    used, stored = encode(codec, data)
    if length != len(data):
        with pytest.raises(Corrupt):
            decode(used, bytes(stored), length)


@given(st.sampled_from([Codec.ZSTD, Codec.PLANES]), st.binary(max_size=300), st.integers(0, 400))
def test_foreign_bytes_are_corrupt(codec, data, length):
    with pytest.raises(Corrupt):
        decode(codec, b"x" + data, length)


@settings(max_examples=150, deadline=None)
@given(floats, st.integers(0, 2**32), st.integers(0, 255), st.integers(0, 2**32))
def test_damaged_planes_are_corrupt_or_other_numbers_but_never_break(name, place, value, seed):
    raw = random_floats(seed % 8, 3000, name, zeros=0.1, spread=1 + seed % 3)
    used, stored = encode(Codec.PLANES, raw, dtype=name)
    data = bytearray(stored)
    places = [place % len(data), place % 32] if place % 2 else [place % 32]  # heads, mostly
    for each in places:
        data[each] = value
    with contextlib.suppress(Corrupt):
        assert len(decode(used, data, len(raw))) == len(raw)
    for length in (len(data) - 1, place % len(data)):
        with pytest.raises(Corrupt):
            decode(used, bytes(stored)[:length], len(raw))
    if used is not Codec.RAW:
        with pytest.raises(Corrupt):
            decode(used, bytes(stored) + b"\0", len(raw))


EXPONENTS = ("0102", "004100800000", "800c000000 28b52ffd 2003190000 010fe1", "60")  # as in docs/format.md
PAIRS = ("0103", "802000408000", "400c000000 28b52ffd 2003190000 900010", "02000000 05000000 0030")
TRIPLES = ("0104", "802000408000", "400b000000 28b52ffd 2002110000 2500", "01000000 02000000 05000000 c00030")


def planes_of(kind: str, lower: str, codes: str, others: bytes) -> bytes:
    last = bytes.fromhex(codes) + others
    heads = bytes.fromhex(f"0202 0100 06000000 {kind}") + len(last).to_bytes(4, "little")
    return heads + bytes.fromhex(lower) + last


@pytest.mark.parametrize("plane", [EXPONENTS, PAIRS, TRIPLES])
@pytest.mark.parametrize("change", ["too few", "one more", "far too many"])
def test_other_bytes_than_there_are_codes_for_are_corrupt(plane: tuple[str, str, str, str], change: str):
    kind, lower, codes, others = *plane[:3], bytes.fromhex(plane[3])
    assert len(decode(Codec.PLANES, planes_of(kind, lower, codes, others), 12)) == 12
    broken = {"too few": others[:-1], "one more": others + b"\0", "far too many": others * 40_000}[change]
    with pytest.raises(Corrupt, match=r"without a code|cannot be the patches"):
        decode(Codec.PLANES, planes_of(kind, lower, codes, broken), 12)


@pytest.mark.parametrize("places", [(5, 1), (1, 1), (1, 6), (1, 2**32 - 1)])
@pytest.mark.parametrize("plane", [PAIRS, TRIPLES])
def test_patches_out_of_order_or_beyond_the_numbers_are_corrupt(
    plane: tuple[str, str, str, str], places: tuple[int, int]
):
    patches = b"".join(place.to_bytes(4, "little") for place in places) + b"\xc0\x30"
    kind, lower, codes, _ = plane
    with pytest.raises(Corrupt, match="out of order, or beyond"):
        decode(Codec.PLANES, planes_of(kind, lower, codes, patches), 12)


def test_upper_bytes_as_codes_anywhere_but_last_are_corrupt():
    uppers = bytes.fromhex(PAIRS[2] + PAIRS[3])
    head = bytes.fromhex("0202 0103") + len(uppers).to_bytes(4, "little") + bytes.fromhex("0100 06000000")
    with pytest.raises(Corrupt, match="only be the last"):
        decode(Codec.PLANES, head + uppers + bytes(6), 12)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [4096, 70_001, (1 << 19) + 1, (1 << 19) + 12_345])
def test_weights_with_some_far_from_the_rest_are_stored_by_their_upper_bytes(name: str, count: int):
    width = PLANE_WIDTHS[name]
    raw = np.frombuffer(random_floats(count, count, name), f"<u{width}").copy()
    places = np.random.default_rng(count).integers(0, count, count // 300)
    raw[places] = places * 2654435761 % (1 << 8 * width)
    raw[-1] = 0
    used, stored = encode(Codec.PLANES, raw.tobytes(), dtype=name)
    assert used is Codec.PLANES
    assert memoryview(stored)[2 + 6 * (width // 2) + 1] == 3
    assert bytes(decode(used, stored, raw.nbytes)) == raw.tobytes()


@pytest.mark.parametrize("count", [4096, 70_001, (1 << 19) + 12_345])
def test_numbers_of_one_sign_are_stored_three_to_a_byte(count: int):
    random = np.random.default_rng(count)
    raw = (random.integers(0x3A, 0x40, count) << 8 | random.integers(0, 256, count)).astype("<u2")
    raw[[200, 201, -1]] = 0x8123  # not in the sample
    used, stored = encode(Codec.PLANES, raw.tobytes(), dtype="bfloat16")
    assert memoryview(stored)[9] == 4
    assert bytes(decode(used, stored, raw.nbytes)) == raw.tobytes()


def values_by_the_book(packing: Packing, codes: bytes, count: int, highest: int) -> list[int]:
    """Return the upper bytes that codes stand for, one by one as docs/format.md has it."""
    if packing is Packing.TRIPLES:
        digits = [code // 6**digit % 6 for digit in range(3) for code in codes]
        return [(highest - digit) % 256 for digit in digits][:count]
    apart = {
        (16 * d + 8 * s + 17 * e + 128 * t) % 256: (d + 128 * s, e + 128 * t)
        for d in range(8)
        for s in range(2)
        for e in range(8)
        for t in range(2)
    }
    return [(highest - offset) % 256 for code in codes for offset in apart[code]][:count]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Packing),
    st.integers(1, 300),
    st.integers(0, 255),
    st.binary(min_size=1, max_size=40),
    st.dictionaries(st.integers(0, 299), st.integers(0, 255), max_size=9),
)
def test_whatever_codes_of_upper_bytes_say_is_read_as_the_format_document_says(
    packing, count, highest, few, patches
):
    few = bytes(code % 216 for code in few) if packing is Packing.TRIPLES else few
    codes = (few * 300)[: -(-count // packing.value)]
    patched = {place: patches[place] for place in sorted(patches) if place < count}
    expected = dict(enumerate(values_by_the_book(packing, codes, count, highest))) | patched
    frame = compress_by_entropy(codes)
    body = bytes([highest]) + len(frame).to_bytes(4, "little") + frame
    body += b"".join(place.to_bytes(4, "little") for place in patched) + bytes(patched.values())
    assert list(decode_uppers(memoryview(body), count, packing)) == list(expected.values())


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_what_is_still_looked_at_is_not_overwritten_by_what_is_encoded_next(name: str):
    raws = [random_floats(seed, 50_000, name) for seed in range(8)]
    stored = [encode(Codec.PLANES, raw, dtype=name) for raw in raws]
    part = memoryview(stored.pop()[1])[100:200]
    before = bytes(part)
    for raw in raws:
        encode(Codec.PLANES, raw, dtype=name)
    assert bytes(part) == before
    for raw, (used, data) in zip(raws, stored, strict=False):
        assert bytes(decode(used, data, len(raw))) == raw


def bombs() -> dict[str, tuple[Codec, bytes]]:
    """Stored bytes that claim or hold far more than the chunk that they are said to be."""
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    half = compress_by_entropy(bytes(CHUNK_BYTES // 2))
    length = len(bomb).to_bytes(4, "little")
    exponents = b"\x80" + length + bomb
    return {
        "a frame": (Codec.ZSTD, bomb),
        "a plane": (Codec.PLANES, b"\2\2" + (b"\1\1" + length) * 2 + bomb * 2),
        "codes": (
            Codec.PLANES,
            b"\2\2\1\1"
            + len(half).to_bytes(4, "little")
            + b"\1\2"
            + (len(exponents)).to_bytes(4, "little")
            + half
            + exponents,
        ),
        "upper bytes": (
            Codec.PLANES,
            b"\2\2\1\1"
            + len(half).to_bytes(4, "little")
            + b"\1\3"
            + (len(exponents)).to_bytes(4, "little")
            + half
            + exponents,
        ),
        "a length": (Codec.PLANES, b"\2\2" + b"\1\0\xff\xff\xff\xff" * 2 + bytes(1000)),
        "many fields": (Codec.PLANES, b"\x08\xff" + b"\1\0\0\0\0\0" * 255),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_before_it_goes_off(name: str):
    codec, stored = bombs()[name]
    assert len(stored) < 100_000
    tracemalloc.start()
    with pytest.raises(Corrupt):
        decode(codec, stored, CHUNK_BYTES)
    assert tracemalloc.get_traced_memory()[1] < 3 * CHUNK_BYTES
    tracemalloc.stop()


def test_a_sound_chunk_is_decoded_within_a_few_times_its_size():
    raw = random_floats(3, CHUNK_BYTES // 4, "float32")
    used, stored = encode(Codec.PLANES, raw, dtype="float32")
    assert used is Codec.PLANES
    tracemalloc.start()
    assert bytes(decode(used, stored, len(raw))) == raw
    assert tracemalloc.get_traced_memory()[1] < 4 * CHUNK_BYTES
    tracemalloc.stop()


def test_a_frame_that_hides_its_length_or_has_company_is_corrupt():
    raw = np.arange(1000, dtype=np.uint8).tobytes()
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    with pytest.raises(Corrupt):
        decode(Codec.ZSTD, hidden, len(raw))
    with pytest.raises(Corrupt):
        decode(Codec.ZSTD, bytes(encode(Codec.ZSTD, raw)[1]) + b"more", len(raw))
