"""Which checkpoint a restore takes, from which source, and what it says when one is not as it was written."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.engine.asking import ask_for_steps
from checkpoint.engine.held import Held
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import load
from checkpoint.engine.source import HeldSource, Source, StoreSource
from checkpoint.errors import Corrupt, Incomplete, NoCheckpoint, StoreUnavailable, Unsupported
from checkpoint.format.codec import Codec
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box
from checkpoint.format.manifest import Manifest, encode_manifest, encode_page, page_ref
from checkpoint.format.sealed import seal, unseal
from checkpoint.store.contract import ByteRange
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.format_samples import sample_tensors, write_checkpoint
from tests.restore_samples import Unsteady, copy_store


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def is_step(state: Any, step: int) -> bool:
    return all(bits_of(state[name]) == bits.tobytes() for name, (_, bits) in sample_tensors(step).items())


def two_steps() -> MemoryStore:
    store = MemoryStore("two")
    for step in (1, 2):
        write_checkpoint(store, step)
    return store


def as_version(store: MemoryStore, step: int, version: int) -> None:
    key = manifest_key(step)
    store.put(key, seal("manifest", unseal("manifest", store.read(key)[0], key), version))


def broken_page(store: MemoryStore, step: int) -> None:
    key = StoreSource(store).manifest(step).pages[0].key
    store.put(key, bytes(len(bytes(store.read(key)[0]))))


def test_a_source_reads_a_manifest_once_and_asks_again_for_one_that_was_not_there():
    store = MemoryStore("once")
    source = StoreSource(store)
    with pytest.raises(NoCheckpoint):
        source.manifest(1)
    write_checkpoint(store, 1)
    found = source.manifest(1)
    store.delete(manifest_key(1))
    assert source.manifest(1) is found


@pytest.mark.parametrize("version", [2, 99])
def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(version):
    store = two_steps()
    as_version(store, 2, version)
    with pytest.raises(Unsupported, match=f"version {version}"):
        load(store)
    assert load(store, 1).manifest.step == 1


def test_another_version_below_a_damaged_checkpoint_is_refused_as_well():
    store = two_steps()
    as_version(store, 1, 2)
    broken_page(store, 2)
    with pytest.raises(Unsupported):
        load(store)


def test_a_read_that_failed_once_is_done_again_and_does_not_cost_the_checkpoint():
    store = two_steps()
    for nth in range(1, 6):

        def zeros(number: int, key: str, found: Any, nth: int = nth) -> Any:
            return [bytes(len(one)) for one in found] if number == nth else found

        broken = Unsteady(store, zeros)
        loaded = load(broken)
        assert loaded.manifest.step == 2 and is_step(loaded.state, 2)
        assert (loaded.report.num_detours > 0) == (nth <= 3)  # manifest, page, pack


def test_an_outage_is_no_reason_to_take_an_older_checkpoint():
    store = two_steps()
    for nth in range(1, 4):

        def out(number: int, key: str, found: Any, nth: int = nth) -> Any:
            if number >= nth:
                raise StoreUnavailable("on purpose")
            return found

        with pytest.raises(StoreUnavailable):
            load(Unsteady(store, out))
        loaded = load([StoreSource(Unsteady(store, out), "near"), StoreSource(store, "far")])
        assert is_step(loaded.state, 2)
        assert [detour.source for detour in loaded.report.detours] == ["near"]


def test_a_source_that_cannot_even_list_is_passed_over_unless_it_is_the_only_one():
    class Away(MemoryStore):
        def list(self, prefix: str) -> Any:
            raise StoreUnavailable("away")

    loaded = load([StoreSource(Away("near"), "near"), StoreSource(two_steps(), "far")])
    assert loaded.manifest.step == 2 and loaded.report.bytes_by_source.keys() == {"far"}
    with pytest.raises(StoreUnavailable, match="away"):
        load(Away("alone"))


@pytest.mark.parametrize("near", ["store", "memory"])
def test_a_far_source_that_never_answers_costs_no_more_than_its_patience_and_is_named(near):
    store, never = two_steps(), threading.Event()
    nearest: Source = StoreSource(store) if near == "store" else HeldSource(held_of(store, 2))

    class Silent(MemoryStore):
        def list(self, prefix: str) -> Any:
            assert not never.wait(60), "nobody waits for this"

    loaded = load([nearest, StoreSource(Silent("s"), "far")], policy=ReadPolicy(patience_s=0.05))
    assert loaded.manifest.step == 2 and loaded.report.unreached == ("far",)
    never.set()


def test_an_empty_store_beside_one_that_never_answers_is_no_fresh_start_and_says_so_soon():
    never = threading.Event()

    class Silent(MemoryStore):
        def list(self, prefix: str) -> Any:
            assert not never.wait(60), "nobody waits for this"

    class Away(MemoryStore):
        def list(self, prefix: str) -> Any:
            raise StoreUnavailable("away")

    policy = ReadPolicy(empty_patience_s=0.05)
    for far in (Silent("s"), Away("a")):
        sources = [StoreSource(MemoryStore()), StoreSource(far, "far")]
        with pytest.raises(
            StoreUnavailable, match=r"far may have some.*empty_patience_s.*start from nothing"
        ):
            load(sources, policy=policy)
    never.set()


def test_a_slow_near_source_is_waited_for_however_soon_a_far_one_answers():
    store, answered = two_steps(), threading.Event()

    class Slow(MemoryStore):
        def list(self, prefix: str) -> Any:
            assert answered.wait(20)
            return store.list(prefix)

    class Quick(StoreSource):
        def steps(self) -> list[int]:
            threading.Timer(0.2, answered.set).start()
            return [1]

    far = Quick(store, "far")
    asked = ask_for_steps([StoreSource(Slow("slow")), far], ReadPolicy(patience_s=0.01))
    assert asked.steps == [2, 1] and asked.outages == {}


def test_the_newest_step_of_any_source_is_taken():
    near, far = MemoryStore("near"), MemoryStore("far")
    write_checkpoint(near, 3)
    for step in (3, 4):
        write_checkpoint(far, step)
    loaded = load([StoreSource(near, "near"), StoreSource(far, "far")])
    assert loaded.manifest.step == 4
    assert load([StoreSource(near, "near"), StoreSource(far, "far")], 3).report.bytes_by_source.keys() == {
        "near"
    }


def test_an_index_that_one_source_has_lost_serves_from_another_with_the_chunks_of_the_first():
    near = two_steps()
    far = copy_store(near)
    broken_page(near, 2)
    for pack in StoreSource(far).manifest(2).packs:
        far.delete(pack.key)
    loaded = load([StoreSource(near, "near"), StoreSource(far, "far")])
    assert loaded.manifest.step == 2 and is_step(loaded.state, 2)
    assert loaded.report.bytes_by_source.keys() == {"near"}


def test_a_source_whose_checkpoint_of_the_step_has_other_content_is_left_out():
    near, far = two_steps(), MemoryStore("far")
    write_checkpoint(far, 2, sample_tensors(7))
    near.delete(StoreSource(near).manifest(2).packs[0].key)
    sources = [StoreSource(near, "near"), StoreSource(far, "far")]
    loaded = load(sources)
    assert loaded.manifest.step == 1
    assert any(detour.source == "far" and "other content" in detour.why for detour in loaded.report.detours)
    with pytest.raises(Corrupt, match="missing"):
        load(sources, 2)


def test_a_store_of_nothing_has_no_checkpoint():
    with pytest.raises(NoCheckpoint, match="no checkpoint"):
        load(MemoryStore())
    with pytest.raises(NoCheckpoint, match="step 5"):
        load(two_steps(), 5)


def held_of(store: MemoryStore, step: int) -> Held:
    """Return what a host would hold of a step: its raw chunks one after the other, in memory."""
    source = StoreSource(store)
    manifest = source.manifest(step)
    chunks, memory = [], bytearray()
    for chunk in source.chunks(manifest):
        bits = sample_tensors(step)[manifest.tensors[chunk.tensor].name][1]
        raw = np.ascontiguousarray(bits[chunk.box.within(Box.whole(bits.shape))]).tobytes()
        place = replace(chunk, codec=Codec.RAW, pack=0, offset=len(memory), num_bytes=len(raw))
        chunks.append(place)
        memory += raw
    return Held(replace(manifest, packs=(), pages=()), chunks, memoryview(memory))


def test_what_a_host_holds_is_taken_first_and_a_flipped_bit_in_it_is_mended_from_the_store():
    store = two_steps()
    held = held_of(store, 2)
    sources: list[Source] = [HeldSource(held), StoreSource(store)]
    report = load(sources).report
    assert report.bytes_by_source.keys() == {"memory"}
    held.memory[100] ^= 4
    loaded = load(sources)
    assert is_step(loaded.state, 2) and loaded.manifest.step == 2
    assert loaded.report.bytes_by_source.keys() == {"memory", "store"}
    assert [detour.source for detour in loaded.report.detours] == ["memory"]
    with pytest.raises(Corrupt):
        load(HeldSource(held), 2)


def test_what_a_host_holds_of_a_step_that_no_store_has_yet_is_newer():
    store, later = two_steps(), MemoryStore()
    write_checkpoint(later, 3)
    assert load([HeldSource(held_of(later, 3)), StoreSource(store)]).manifest.step == 3


def test_a_store_that_returns_less_than_it_was_asked_for_is_not_believed():
    store = two_steps()
    manifest = StoreSource(store).manifest(2)
    ranges = [ByteRange(0, 100), ByteRange(200, 50)]
    spoilers: list[Callable[[Any], Any]] = [lambda found: found[:1], lambda found: [found[0], found[1][:-1]]]
    for spoil in spoilers:

        def short(number: int, key: str, found: Any, spoil: Callable[[Any], Any] = spoil) -> Any:
            return spoil(found)

        with pytest.raises(Corrupt, match="read"):
            StoreSource(Unsteady(store, short)).read(manifest, 0, ranges)


def rewrite(store: MemoryStore, manifest: Manifest) -> None:
    store.put(manifest_key(manifest.step), encode_manifest(manifest))


def test_chunks_that_the_index_puts_into_each_other_s_place_are_refused():
    store = two_steps()
    manifest = StoreSource(store).manifest(2)
    chunks = list(StoreSource(store).chunks(manifest))
    chunks[0], chunks[1] = replace(chunks[0], box=chunks[1].box), replace(chunks[1], box=chunks[0].box)
    page = encode_page(chunks)
    store.put(manifest.pages[0].key, page)
    pages = (page_ref(manifest.pages[0].key, page, len(chunks)),)
    rewrite(store, replace(manifest, pages=pages))
    with pytest.raises(Corrupt, match="belongs elsewhere"):
        load(store, 2)


def test_chunks_that_do_not_add_up_to_what_the_manifest_says_of_their_tensor_are_refused():
    store = two_steps()
    manifest = StoreSource(store).manifest(2)
    first, *others = manifest.tensors
    rewrite(store, replace(manifest, tensors=(replace(first, fingerprint=first.fingerprint ^ 1), *others)))
    with pytest.raises(Corrupt, match="add up"):
        load(store, 2)


def test_an_index_that_leaves_a_chunk_out_is_refused():
    store = two_steps()
    manifest = StoreSource(store).manifest(2)
    page = encode_page(list(StoreSource(store).chunks(manifest))[1:])
    store.put(manifest.pages[0].key, page)
    num_chunks = manifest.pages[0].num_chunks - 1
    rewrite(store, replace(manifest, pages=(page_ref(manifest.pages[0].key, page, num_chunks),)))
    with pytest.raises(Incomplete, match="exactly once"):
        load(store, 2)


def test_a_source_that_is_done_without_is_not_asked_again_behind_the_restore_s_back(quiet_retries):
    class Down(MemoryStore):
        def list(self, prefix):
            raise StoreUnavailable("down")

    far = Retrying(Down("far"), RetryPolicy(deadline_s=600.0, first_wait_s=0.01, longest_wait_s=0.01))
    before = set(threading.enumerate())
    answers = ask_for_steps([StoreSource(two_steps()), StoreSource(far, "far")], ReadPolicy(patience_s=0.05))
    assert answers.steps == [2, 1] and "far" in str(answers.outages[1])
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
