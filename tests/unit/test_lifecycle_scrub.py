"""The scrub: everything that is not as it was written is named, and nothing else."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.engine.catalog import Catalog
from checkpoint.errors import NoCheckpoint, StoreRefused, StoreUnavailable
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key, page_key
from checkpoint.format.manifest import (
    Manifest,
    chunks_of_page,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.lifecycle.marks import verified
from checkpoint.lifecycle.pace import Pace
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.contract import Data
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from flows import stores
from tests.format_samples import write_checkpoint
from tests.lifecycle_worlds import save, write_chain
from tests.wrapped_stores import Faulty, Lost


@pytest.fixture(params=[Codec.RAW, Codec.ZSTD])
def sample(request) -> tuple[MemoryStore, Manifest]:
    """A store with the checkpoints of steps 1 and 2, and the manifest of step 2."""
    store = MemoryStore("sample")
    write_checkpoint(store, 1, codec=request.param)
    return store, write_checkpoint(store, 2, codec=request.param)


def test_a_sound_store_is_found_sound(sample):
    store, _ = sample
    report = verify(store)
    assert (report.steps, report.is_sound, report.num_tensors, report.num_chunks) == ((2, 1), True, 8, 10)
    assert report.num_bytes == sum(chunk.num_bytes for step in (1, 2) for chunk in _chunks(store, step))
    assert verify(store, 2).steps == (2,)


def test_a_damaged_receipt_is_named_and_its_checkpoint_is_whole_all_the_same():
    store = MemoryStore("receipts")
    save(store, 1, [1, 2])
    save(store, 2, [1, 3])
    keys = [entry.key for entry in store.list("index/") if entry.key.endswith("-0000")]
    assert len(keys) == 2 and verify(store).spare == ()
    one, other = (bytes(store.read(key)[0]) for key in keys)
    for damaged in (one[:-1], b"", one[:50] + bytes([one[50] ^ 1]) + one[51:], other):
        store.put(keys[0], damaged)
        report = verify(store)
        assert report.is_sound and [(bad.step, bad.key) for bad in report.spare] == [(1, keys[0])]
        assert "no restore reads a receipt" in report.spare[0].why


def _chunks(store: MemoryStore, step: int):
    manifest = Catalog(store).manifest(step)
    return chunks_of_page(manifest, manifest.pages[0], store.read(manifest.pages[0].key)[0])


def test_a_flipped_bit_is_found_in_the_tensor_it_struck(sample):
    store, manifest = sample
    key = manifest.packs[0].key
    pack = bytes(store.read(key)[0])
    for chunk in _chunks(store, 2):
        damaged = bytearray(pack)
        damaged[chunk.offset + chunk.num_bytes // 2] ^= 16
        store.put(key, damaged)
        report = verify(store)
        name = manifest.tensors[chunk.tensor].name
        assert report.bad_steps == (2,)
        assert [(one.item.partition(" ")[0], one.key) for one in report.bad] == [(name, key)]
        assert key in report.bad[0].item


def test_a_truncated_pack_is_bad_from_there_on(sample):
    store, manifest = sample
    key = manifest.packs[0].key
    chunks = _chunks(store, 2)
    store.put(key, bytes(store.read(key)[0])[: chunks[-1].offset + 1])
    report = verify(store)
    assert [one.item.partition(" (")[0] for one in report.bad] == [f"the index of {key}", "optimizer/step"]
    assert all("cut short" in one.why and one.key == key for one in report.bad)


def test_a_flipped_bit_in_a_pack_s_own_index_is_found_although_no_restore_reads_it(sample):
    store, manifest = sample
    key = manifest.packs[0].key
    data = bytearray(store.read(key)[0])
    data[-40] ^= 1
    store.put(key, data)
    (bad,) = verify(store).bad
    assert (bad.step, bad.item, bad.key) == (2, f"the index of {key}", key)


def test_a_missing_object_is_named(sample):
    store, manifest = sample
    pack, page = manifest.packs[0].key, manifest.pages[0].key
    held = bytes(store.read(pack)[0])
    store.delete(pack)
    (bad,) = verify(store).bad
    assert (bad.item, bad.key) == (pack, pack) and "missing" in bad.why
    store.put(pack, held)
    store.delete(page)
    first, *others = verify(store).bad
    assert (first.item, first.key) == (page, page)
    assert {one.item for one in others} == {"model/weight", "model/bias", "optimizer/step"}


@pytest.mark.parametrize("length", [0, 10, 200, -1])
def test_a_truncated_manifest_is_bad_and_the_others_are_verified_all_the_same(sample, length: int):
    store, _ = sample
    key = manifest_key(2)
    store.put(key, bytes(store.read(key)[0])[:length])
    report = verify(store)
    assert [(one.step, one.item) for one in report.bad] == [(2, key)]
    assert report.num_chunks == 5


def test_content_of_another_place_is_found_although_its_checksum_is_right(sample):
    store, manifest = sample
    first, second, *rest = _chunks(store, 2)
    swapped = [
        dataclasses.replace(first, box=second.box, fingerprint=second.fingerprint),
        dataclasses.replace(second, box=first.box, fingerprint=first.fingerprint),
        *rest,
    ]
    _rewrite(store, manifest, swapped)
    report = verify(store, 2)
    assert "another place" in report.bad[0].why
    assert {one.item.partition(" ")[0] for one in report.bad} == {"model/weight"}


def test_a_hole_and_a_double_cover_are_found(sample):
    store, manifest = sample
    chunks = _chunks(store, 2)
    for wrong in (chunks[1:], [*chunks, chunks[0]]):
        _rewrite(store, manifest, wrong)
        report = verify(store, 2)
        assert [one.item for one in report.bad] == ["model/weight"]


def _rewrite(store: MemoryStore, manifest: Manifest, chunks) -> None:
    page = encode_page(chunks)
    ref = page_ref(manifest.pages[0].key, page, len(chunks))
    store.put(ref.key, page)
    store.put(manifest_key(manifest.step), encode_manifest(dataclasses.replace(manifest, pages=(ref,))))


def test_a_store_without_checkpoints_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NoCheckpoint, match=r"absent holds no checkpoint at all"):
        verify(LocalStore(tmp_path / "absent"))
    store = MemoryStore("sample")
    write_checkpoint(store, 1)
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 7"):
        verify(store, 7)


def test_a_store_that_cannot_be_read_is_an_error_and_not_bad_content(sample):
    store, _ = sample
    with pytest.raises(StoreUnavailable):
        verify(Faulty(store, [Lost("read", 3)]))


@pytest.mark.parametrize("damaged", [1, 3, 5])
def test_damage_is_found_in_all_checkpoints_whose_deltas_stand_on_it(damaged):
    store = MemoryStore("chain")
    manifests = write_chain(store, 5)
    assert verify(store).is_sound
    key = manifests[damaged - 1].packs[-1].key
    data = bytearray(store.read(key)[0])
    data[20] ^= 2
    store.put(key, data)
    report = verify(store)
    assert report.bad_steps == tuple(range(damaged, 6))
    assert {one.key for one in report.bad} == {key}


def test_a_delta_that_was_proved_on_one_base_is_not_taken_for_proved_on_another():
    store = MemoryStore("bases")
    _, manifest = write_chain(store, 2)
    (delta,) = chunks_of_page(manifest, manifest.pages[0], store.read(manifest.pages[0].key)[0])
    assert delta.base is not None
    elsewhere = dataclasses.replace(delta.base, offset=delta.base.offset + 64)
    _rewrite(store, manifest, [dataclasses.replace(delta, base=elsewhere)])
    assert verify(store, 2).num_bad == 1
    old = _page_of(store, manifest, delta)
    store.put(manifest_key(3), encode_manifest(dataclasses.replace(manifest, step=3, pages=(old,))))
    report = verify(store)
    assert (report.steps, report.bad_steps) == ((3, 2, 1), (2,))


def _page_of(store: MemoryStore, manifest: Manifest, chunk):
    key = page_key(1, 3, "h0", 1)
    store.put(key, encode_page([chunk]))
    return page_ref(key, store.read(key)[0], 1)


def test_what_several_checkpoints_share_is_read_once():
    store = MemoryStore("shared")
    save(store, 1, [1, 10, 100])
    for step in (2, 3, 4):
        save(store, step, [1, 10, 100 * step], Catalog(store).manifest(step - 1))
    one = verify(store, 1).num_bytes
    assert verify(store).num_bytes == 2 * one == 6 * 64
    chain = MemoryStore("chain")
    write_chain(chain, 6)
    assert verify(chain).num_bytes == verify(chain, 6).num_bytes


def test_a_chunk_that_is_bad_is_bad_in_every_checkpoint_that_shares_it():
    store = MemoryStore("shared")
    first = save(store, 1, [1, 10])
    assert first is not None
    save(store, 2, [1, 20], first)
    data = bytearray(store.read(first.packs[0].key)[0])
    data[3] ^= 1
    store.put(first.packs[0].key, data)
    assert verify(store).bad_steps == (1, 2)


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=60)
def test_any_flipped_bit_of_any_object_is_found(seed, data):
    store = MemoryStore("flipped")
    write_chain(store, 3)
    save(store, 7, [seed % 3, 2], host="h1")
    entry = data.draw(
        st.sampled_from([*store.list("packs/"), *store.list("index/"), *store.list("manifests/")])
    )
    values = bytearray(store.read(entry.key)[0])
    place = data.draw(st.integers(0, len(values) - 1))
    is_padding = entry.key.startswith("packs/") and not values[place] and 50 < place < len(values) - 32
    is_receipt = entry.key.startswith("index/") and entry.key.endswith("-0000")
    values[place] ^= 1 << data.draw(st.integers(0, 7))
    store.put(entry.key, values)
    assert not verify(store).is_sound or is_padding or is_receipt


def test_what_was_found_is_written_down_and_taken_back_once_it_is_no_longer_so(sample):
    store, manifest = sample
    verify(store)
    assert {step for step, _ in verified(store)} == {1, 2}
    key = manifest.packs[0].key
    held = bytes(store.read(key)[0])
    store.put(key, b"")
    verify(store)
    assert {step for step, _ in verified(store)} == {1}
    store.put(key, held)
    verify(store, 2)
    assert {step for step, _ in verified(store)} == {1, 2}


def test_a_store_that_takes_no_writes_is_verified_all_the_same_and_the_report_says_so(sample):
    class ReadOnly(MemoryStore):
        def put(self, key: str, data: Data) -> None:
            raise StoreRefused(f"no permission to write {key}")

    store = ReadOnly("read-only")
    for entry in sample[0].list(""):
        store.put_new(entry.key, sample[0].read(entry.key)[0])
    report = verify(store)
    assert report.is_sound and "no permission" in report.unrecorded


def test_a_scrub_with_a_budget_goes_on_where_the_last_one_stopped():
    now_s = 1000.0
    store = MemoryStore("budget", clock=lambda: now_s)
    for step in range(1, 6):
        write_checkpoint(store, step)
    one = verify(store, 1).num_bytes
    now_s = 2000.0
    seen = []
    while (report := verify(store, since_s=2000.0, budget_bytes=one + 1)).left:
        seen.append((report.steps, report.skipped, report.left))
    assert seen == [((5, 4), (), (3, 2, 1)), ((3, 2), (5, 4), (1,))]
    assert (report.steps, report.skipped) == ((1,), (5, 4, 3, 2))
    assert verify(store, since_s=2000.0).steps == ()


def test_a_pace_is_kept_on_average():
    class Time:
        now_s = 5.0

        def sleep(self, seconds: float) -> None:
            assert seconds > 0
            self.now_s += seconds

    time = Time()
    store = MemoryStore("pace")
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 22, np.uint32)  # 16 MiB, in batches
    for step in (1, 2):
        write_checkpoint(store, step, {"x": ("float32", bits)}, codec=Codec.RAW, max_chunk_bytes=4 << 20)
    report = verify(store, pace=Pace(1 << 20, clock=lambda: time.now_s, sleep=time.sleep))
    assert time.now_s - 5.0 == pytest.approx(report.num_bytes / (1 << 20))
    with pytest.raises(ValueError, match="pace"):
        Pace(0)


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_not_called_damaged():
    class Pruned(MemoryStore):
        def read(self, key: str, ranges=None):
            if key.startswith("packs/") and key.endswith("000001"):
                self.delete(key)
                self.delete(manifest_key(1))
            return super().read(key, ranges)

    store = Pruned("pruned")
    for step in (1, 2):
        write_checkpoint(store, step)
    assert verify(store).steps == (2,) and verify(store).is_sound
    write_checkpoint(store, 1, generation=2)
    with pytest.raises(NoCheckpoint, match="removed while it was read"):
        verify(store, 1)


def test_memory_stays_bounded_however_large_the_checkpoint(tmp_path):
    store = LocalStore(tmp_path)
    bits = np.zeros((96, 1 << 18), np.uint32)  # 96 MiB
    write_checkpoint(store, 1, {"x": ("float32", bits)}, codec=Codec.RAW, max_chunk_bytes=4 << 20)
    del bits
    tracemalloc.start()
    assert verify(store).is_sound
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20


def test_the_command_line_tells_what_it_did_not_read_and_why(tmp_path):
    store = LocalStore(tmp_path)
    for step in (1, 2, 3):
        write_checkpoint(store, step)
    seen = stores.verify(str(tmp_path), None, since_s=0.0, budget_bytes=1)
    assert [(each["step"], each["whole"]) for each in seen] == [(1, None), (2, None), (3, True)]
    assert "the budget was spent" in seen[0]["note"]
    seen = stores.verify(str(tmp_path), None, since_s=0.0)
    assert [(each["step"], each["whole"]) for each in seen] == [(1, True), (2, True), (3, None)]
    assert "proved recently" in seen[2]["note"]
