"""Large files written in stretches: every byte where it belongs, whatever the system takes at a time."""

import ctypes
import errno
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import StoreRefused
from checkpoint.store import writeback
from checkpoint.store.local import LocalStore


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 200), st.integers(1, 9), st.integers(0, 99))
def test_parts_arrive_in_order_whatever_the_system_takes_at_a_time(sizes, stretch, pieces, seed):
    chance = random.Random(seed)
    parts = [memoryview(chance.randbytes(size)) for size in sizes if size]
    written = bytearray()

    def take_some(descriptor, buffers):
        assert 0 < len(buffers) <= pieces
        data = b"".join(buffers)
        assert len(data) <= stretch
        count = chance.randint(1, len(data))
        written.extend(data[:count])
        return count

    begun: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", take_some)
        patch.setattr(writeback, "_STRETCH_BYTES", stretch)
        patch.setattr(writeback, "_STRETCH_PIECES", pieces)
        patch.setattr(writeback, "_reserve", lambda descriptor, num_bytes: None)
        patch.setattr(writeback, "begin_writing", lambda descriptor, *part: begun.append(part))
        writeback.write_parts(-1, parts)
    assert written == b"".join(parts)
    if begun:
        assert [offset for offset, _ in begun] == [
            sum(size for _, size in begun[:n]) for n in range(len(begun))
        ]
        assert sum(size for _, size in begun) == len(written)


def test_a_value_of_many_megabytes_is_read_back_as_it_was(tmp_path):
    data = random.Random(1).randbytes((17 << 20) + 3)
    store = LocalStore(tmp_path)
    store.put_new(
        "packs/one", [memoryview(data)[start : start + 999_983] for start in range(0, len(data), 999_983)]
    )
    store.put("packs/two", data)
    assert bytes(store.read("packs/one")[0]) == bytes(store.read("packs/two")[0]) == data
    assert {entry.num_bytes for entry in store.list("")} == {len(data)}


def failing_with(number: int):
    def fail(*arguments):
        ctypes.set_errno(number)
        return -1

    return fail


def test_a_disk_without_room_refuses_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writeback, "_fallocate", failing_with(errno.ENOSPC))
    store = LocalStore(tmp_path)
    with pytest.raises(
        StoreRefused, match="No space left on device; check the path, its permissions and the space"
    ):
        store.put_new("packs/one", bytes(9 << 20))
    assert store.list("") == []
    assert list((tmp_path / ".incoming").iterdir()) == []
    store.put_new("packs/small", b"abc")


@pytest.mark.parametrize("fallocate", [None, failing_with(errno.EOPNOTSUPP)])
def test_a_file_system_that_knows_no_reservation_is_written_all_the_same(tmp_path, monkeypatch, fallocate):
    monkeypatch.setattr(writeback, "_fallocate", fallocate)
    monkeypatch.setattr(writeback, "_sync_file_range", None)
    store = LocalStore(tmp_path)
    data = random.Random(2).randbytes(9 << 20)
    store.put_new("packs/one", data)
    assert bytes(store.read("packs/one")[0]) == data
