"""The scrub: everything that is not as it was written is named, and nothing else."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from checkpoint.errors import NoCheckpoint, StoreUnavailable
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key
from checkpoint.format.manifest import (
    Manifest,
    chunks_of_page,
    encode_manifest,
    encode_page,
    page_ref,
)
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Faulty, Lost
from tests.format_samples import write_checkpoint


@pytest.fixture(params=[Codec.RAW, Codec.ZSTD])
def sample(request) -> tuple[MemoryStore, Manifest]:
    """A store with the checkpoints of steps 1 and 2, and the manifest of step 2."""
    store = MemoryStore("sample")
    write_checkpoint(store, 1, codec=request.param)
    return store, write_checkpoint(store, 2, codec=request.param)


def test_a_sound_store_is_found_sound(sample):
    store, _ = sample
    report = verify(store)
    assert (report.steps, report.is_sound, report.num_tensors, report.num_chunks) == ((1, 2), True, 8, 10)
    assert report.num_bytes == sum(chunk.num_bytes for step in (1, 2) for chunk in _chunks(store, step))
    assert verify(store, 2).steps == (2,)


def _chunks(store: MemoryStore, step: int):
    from checkpoint.engine.catalog import Catalog

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
        assert [one.item.partition(" ")[0] for one in report.bad] == [name, name]
        assert key in report.bad[0].item
        assert "fingerprint" in report.bad[1].why


def test_a_truncated_pack_is_bad_from_there_on(sample):
    store, manifest = sample
    key = manifest.packs[0].key
    chunks = _chunks(store, 2)
    store.put(key, bytes(store.read(key)[0])[: chunks[-1].offset + 1])
    report = verify(store)
    assert {one.item.partition(" ")[0] for one in report.bad} == {"optimizer/step"}
    assert "cut short" in report.bad[0].why


def test_a_missing_object_is_named(sample):
    store, manifest = sample
    pack, page = manifest.packs[0].key, manifest.pages[0].key
    held = bytes(store.read(pack)[0])
    store.delete(pack)
    assert all(
        pack in one.item or one.item in {t.name for t in manifest.tensors} for one in verify(store).bad
    )
    assert verify(store).num_bad == 5 + 3
    store.put(pack, held)
    store.delete(page)
    bad = verify(store).bad
    assert bad[0].item == page
    assert {one.item for one in bad[1:]} == {"model/weight", "model/bias", "optimizer/step"}


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
