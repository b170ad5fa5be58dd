"""What every store promises, as one suite of tests that every store's tests inherit."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint.errors import AlreadyExists, NotFound, StoreError
from checkpoint.store.contract import Buffer, ByteRange, Entry, Store
from checkpoint.store.open import probe

KEY = "packs/000001-h0-000000"
NUM_WRITERS = 16


class StoreContract:
    """Inherit this and give a fixture `store` that is empty: then it is proved to be a Store."""

    def test_what_was_put_is_read_back_whole(self, store: Store):
        store.put(KEY, b"abc")
        assert [bytes(part) for part in store.read(KEY)] == [b"abc"]

    def test_every_kind_of_buffer_can_be_written(self, store: Store):
        buffers: list[Buffer] = [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"xabcx")[1:4]]
        for number, data in enumerate(buffers):
            store.put(f"a/{number}", data)
            store.put_new(f"b/{number}", data)
            assert bytes(store.read(f"a/{number}")[0]) == bytes(store.read(f"b/{number}")[0]) == b"abc"

    def test_a_value_may_be_written_in_parts(self, store: Store):
        parts: list[Buffer] = [b"ab", bytearray(), memoryview(b"xcdx")[1:3], b"e"]
        store.put("a", parts)
        store.put_new("b", parts)
        store.put("c", [b"%04d" % number for number in range(3000)])
        store.put_new("d", [])
        found = [bytes(store.read(key)[0]) for key in "abcd"]
        assert found == [b"abcde", b"abcde", b"".join(b"%04d" % number for number in range(3000)), b""]

    def test_an_empty_value_is_a_value(self, store: Store):
        store.put_new(KEY, b"")
        assert bytes(store.read(KEY)[0]) == b""
        assert [(entry.key, entry.num_bytes) for entry in store.list("")] == [(KEY, 0)]

    def test_a_value_is_what_it_was_when_it_was_written(self, store: Store):
        data = bytearray(b"abc")
        store.put(KEY, data)
        data[:] = b"xyz"
        assert bytes(store.read(KEY)[0]) == b"abc"

    def test_put_replaces_and_put_new_does_not(self, store: Store):
        store.put_new(KEY, b"first")
        with pytest.raises(AlreadyExists, match=KEY):
            store.put_new(KEY, b"second")
        assert bytes(store.read(KEY)[0]) == b"first"
        store.put(KEY, b"third")
        assert bytes(store.read(KEY)[0]) == b"third"

    def test_put_new_admits_exactly_one_of_many_writers(self, store: Store):
        for race in range(3):
            key = f"manifests/{race}"
            ready = threading.Barrier(NUM_WRITERS)

            def write(writer: int, key: str = key, ready: threading.Barrier = ready) -> bool:
                ready.wait()
                try:
                    store.put_new(key, b"%d" % writer * 1000)
                except AlreadyExists:
                    return False
                return True

            with ThreadPoolExecutor(NUM_WRITERS) as writers:
                won = list(writers.map(write, range(NUM_WRITERS)))
            assert won.count(True) == 1
            assert bytes(store.read(key)[0]) == b"%d" % won.index(True) * 1000

    def test_a_reader_sees_a_write_whole_or_not_at_all(self, store: Store):
        values = {bytes([letter]) * 300_000 for letter in b"abcd"}
        store.put(KEY, min(values))
        done = threading.Event()

        def overwrite() -> None:
            for value in sorted(values) * 2:
                store.put(KEY, value)
            done.set()

        with ThreadPoolExecutor(1) as writer:
            writing = writer.submit(overwrite)
            seen = set()
            while not done.is_set() and not writing.done():
                seen.add(bytes(store.read(KEY)[0]))
                assert {entry.num_bytes for entry in store.list("")} == {300_000}
            writing.result()
        assert seen <= values

    def test_ranges_come_back_in_order_and_exactly(self, store: Store):
        data = bytes(range(256)) * 100
        store.put(KEY, data)
        ranges = [ByteRange(5, 10), ByteRange(0, 1), ByteRange(25_599, 1), ByteRange(7, 0), ByteRange(5, 10)]
        parts = [bytes(part) for part in store.read(KEY, ranges)]
        assert parts == [data[one.offset : one.stop] for one in ranges]
        assert list(store.read(KEY, [])) == []

    @pytest.mark.parametrize("wanted", [ByteRange(2, 2), ByteRange(3, 1), ByteRange(1000, 10)])
    def test_a_range_beyond_the_end_is_not_found(self, store: Store, wanted: ByteRange):
        store.put(KEY, b"abc")
        with pytest.raises(NotFound, match=KEY):
            store.read(KEY, [ByteRange(0, 1), wanted])

    def test_what_is_not_there_is_not_found(self, store: Store):
        with pytest.raises(NotFound, match=KEY):
            store.read(KEY)
        with pytest.raises(NotFound, match=KEY):
            store.read(KEY, [ByteRange(0, 1)])
        store.put(KEY, b"abc")
        with pytest.raises(NotFound):
            store.read("packs")

    def test_a_listing_has_what_begins_with_the_prefix_by_key(self, store: Store):
        keys = ["a/b/c", "a/b/d", "a/bc", "a/c", "ab", "b/1", "b/10", "b/2"]
        for key in reversed(keys):
            store.put(key, key.encode())
        for prefix in ("", "a", "a/", "a/b", "a/b/", "b/1", "b/10", "nothing", "a/nothing/"):
            found = store.list(prefix)
            assert [entry.key for entry in found] == [key for key in keys if key.startswith(prefix)]
            assert all(entry.num_bytes == len(entry.key) for entry in found)

    def test_a_listing_tells_when_something_was_written(self, store: Store):
        began_s = time.time()
        store.put(KEY, b"abc")
        (entry,) = store.list("packs/")
        assert isinstance(entry, Entry)
        assert began_s - 5 <= entry.modified_s <= time.time() + 5

    def test_a_listing_shows_a_write_of_another_client_at_once(self, store: Store, other: Store):
        assert store.list("") == []
        other.put(KEY, b"abc")
        assert [entry.key for entry in store.list("")] == [KEY]
        other.delete(KEY)
        assert store.list("") == []

    def test_to_delete_is_to_forget_and_twice_is_fine(self, store: Store):
        store.put(KEY, b"abc")
        store.delete(KEY)
        store.delete(KEY)
        store.delete("packs/never-was")
        assert store.list("") == []
        store.put_new(KEY, b"again")

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", ".hidden", "a/.b", "a b", "ä", "a\\b", "a" * 513],
    )
    def test_a_key_that_could_lead_out_of_the_store_is_refused(self, store: Store, key: str):
        for use in (
            lambda: store.put(key, b""),
            lambda: store.put_new(key, b""),
            lambda: store.read(key),
            lambda: store.delete(key),
        ):
            with pytest.raises(StoreError, match="is no key"):
                use()

    def test_a_probe_finds_that_it_does_what_a_run_needs(self, store: Store):
        found = probe(store)
        assert (found.is_writable, found.is_readable, found.is_conditional, found.problem) == (
            True,
            True,
            True,
            "",
        )
        assert store.list("") == []

    def test_its_name_is_its_url(self, store: Store):
        assert "://" in str(store)
