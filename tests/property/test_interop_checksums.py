"""CRC-32s of pieces, joined in any order, are zlib's of the whole."""

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.interop.checksums import Checksums, combined


@given(st.binary(max_size=500), st.binary(max_size=500))
@settings(max_examples=200)
def test_two_pieces_have_the_checksum_of_the_whole(first, second):
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.data())
@settings(max_examples=300)
def test_whatever_is_read_and_in_whatever_order_tells_a_damaged_part(data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    file = data.draw(st.binary(min_size=sum(sizes) + 7, max_size=sum(sizes) + 7))
    spans, begin = [], 3
    for size in sizes:
        spans.append((begin, size))
        begin += size
    flipped = data.draw(st.sampled_from([None, *range(3, begin)]))
    checksums = Checksums()
    for number, (first, size) in enumerate(spans):
        checksums.expect("file", str(number), (first, size), zlib.crc32(file[first : first + size]))
    damaged = bytearray(file)
    if flipped is not None:
        damaged[flipped] ^= 1 << data.draw(st.integers(0, 7))
    found = []
    reads = data.draw(st.lists(st.tuples(st.integers(0, len(file)), st.integers(0, 60)), max_size=12))
    for offset, size in [*reads, *data.draw(st.permutations([(0, begin // 2), (begin // 2, len(file))]))]:
        found.append(checksums.saw("file", offset, memoryview(damaged)[offset : offset + size]))
    assert checksums.gaps() == []
    owner = [str(n) for n, (first, size) in enumerate(spans) if flipped in range(first, first + size)]
    assert list(dict.fromkeys(one.name for one in found if one)) == owner


def test_only_what_was_mostly_read_is_read_to_its_end():
    checksums = Checksums()
    checksums.expect("file", "sampled", (0, 100), 1)
    checksums.expect("file", "padded", (100, 100), 2)
    for offset, size in ((10, 20), (100, 60), (170, 20)):
        assert checksums.saw("file", offset, memoryview(bytes(size))) is None
    assert [(gap.begin, gap.stop) for gap in checksums.gaps()] == [(160, 170), (190, 200)]
