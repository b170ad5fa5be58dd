"""Whatever layout a state was stored in, any boxes of it come back bit for bit; or there is a clear error."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.restore import load, restore_into
from checkpoint.engine.source import StoreSource
from checkpoint.engine.targets import Wanted, bits_of
from checkpoint.engine.tensors import torch_dtype
from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.format.codec import Buffer, Codec
from checkpoint.format.dtypes import DTYPES
from checkpoint.format.layout import Box
from checkpoint.store.memory import MemoryStore
from tests.restore_samples import (
    Bits,
    Manner,
    Tensors,
    Unsteady,
    Written,
    copy_store,
    random_bits,
    random_cuts,
    write_cut,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

NAMES = sorted(name for name in DTYPES if hasattr(torch, name))
SHAPES = st.sampled_from([(), (0,), (3, 0), (1,), (7,), (64,), (5, 6), (33, 4), (3, 1, 5), (2, 3, 4, 2)])
CHANCES = st.integers(0, 2**32).map(random.Random)


def codec_by(chance: random.Random) -> Any:
    return lambda: chance.choice(list(Codec))


def changed(chance: random.Random, tensors: Tensors) -> dict[str, tuple[str, Bits]]:
    """Return tensors of which some have changed here and there."""
    result = {}
    for name, (dtype, bits) in tensors.items():
        fresh = bits.copy()
        if chance.random() < 0.6 and bits.size:
            flat = fresh.reshape(-1)
            flat[chance.randrange(bits.size)] = random_bits(chance, dtype, (1,))[0]
        result[name] = dtype, fresh
    return result


def write_history(chance: random.Random, store: Any, tensors: Tensors, num_steps: int) -> list[Written]:
    """Write checkpoints one after the other, each built on the one before, or cut anew."""
    history: list[Written] = []
    boxes: dict[str, list[Box]] = {}
    for step in range(1, num_steps + 1):
        is_anew = not history or chance.random() < 0.3
        if is_anew:
            boxes = {
                name: random_cuts(chance, Box.whole(bits.shape), 3) for name, (_, bits) in tensors.items()
            }
        manner = Manner(
            codec=codec_by(chance),
            num_packs=chance.randint(1, 3),
            chunks_per_page=chance.choice([1, 3, 1000]),
            earlier=None if is_anew else history[-1],
        )
        history.append(write_cut(store, step, tensors, boxes, manner))
        tensors = changed(chance, tensors)
    return history


def draw_tensors(data: st.DataObject, chance: random.Random) -> dict[str, tuple[str, Bits]]:
    kinds = data.draw(st.lists(st.tuples(st.sampled_from(NAMES), SHAPES), min_size=1, max_size=5))
    return {f"t{i}": (name, random_bits(chance, name, shape)) for i, (name, shape) in enumerate(kinds)}


def target_of(chance: random.Random, dtype: str, size: tuple[int, ...]) -> torch.Tensor | bytearray:
    """Return memory for a box: a fresh tensor, a strided view, a transposed one, or plain bytes."""
    match chance.randrange(4):
        case 0:
            return torch.zeros(size, dtype=torch.uint8).new_empty(size, dtype=torch_dtype(dtype))
        case 1:
            wide = torch.empty((*size, 2), dtype=torch_dtype(dtype))
            return wide[..., 0]
        case 2:
            return torch.empty(size[::-1], dtype=torch_dtype(dtype)).permute(
                tuple(reversed(range(len(size))))
            )
        case _:
            return bytearray(int(np.prod(size)) * DTYPES[dtype].itemsize)


def bits_in(target: torch.Tensor | Buffer, dtype: str, size: tuple[int, ...]) -> bytes:
    if isinstance(target, torch.Tensor):
        return np.ascontiguousarray(bits_of(target)).tobytes()
    return bytes(target)


def want(chance: random.Random, tensors: Tensors) -> list[Wanted]:
    """Ask for random boxes of the tensors, now and then one twice."""
    wanted = []
    for name, (dtype, bits) in tensors.items():
        boxes = random_cuts(chance, Box.whole(bits.shape), 3) or [Box.whole(bits.shape)]
        for box in chance.sample(boxes, chance.randint(1, len(boxes))) + boxes[: chance.randint(0, 1)]:
            wanted.append(Wanted(name, dtype, bits.shape, box, target_of(chance, dtype, box.size)))
    return wanted


def assert_filled(wanted: list[Wanted], tensors: Tensors) -> None:
    for one in wanted:
        bits = tensors[one.name][1][one.box.within(Box.whole(one.shape))]
        assert bits_in(one.target, one.dtype, one.box.size) == np.ascontiguousarray(bits).tobytes()


@given(CHANCES, st.data())
def test_any_layout_comes_back_in_any_other_bit_for_bit(chance, data):
    store = MemoryStore()
    history = write_history(chance, store, draw_tensors(data, chance), data.draw(st.integers(1, 4)))
    policy = ReadPolicy(
        num_threads=chance.randint(1, 3),
        request_bytes=chance.choice([1, 100, 1 << 20]),
        gap_bytes=chance.choice([0, 64, 1 << 16]),
    )
    for written in chance.sample(history, min(2, len(history))):
        wanted = want(chance, written.tensors)
        restored = restore_into(store, wanted, step=written.manifest.step, policy=policy)
        assert restored.manifest == written.manifest and not restored.report.num_detours
        assert_filled(wanted, written.tensors)


@given(CHANCES, st.data())
def test_a_whole_state_comes_back_bit_for_bit(chance, data):
    store = MemoryStore()
    history = write_history(chance, store, draw_tensors(data, chance), 3)
    loaded = load(store)
    assert loaded.manifest.step == 3 and not loaded.report.fallbacks
    assert_state(loaded.state, history[-1].tensors)


def assert_state(state: dict[str, torch.Tensor], tensors: Tensors) -> None:
    assert state.keys() == tensors.keys()
    for name, (dtype, bits) in tensors.items():
        assert (str(state[name].dtype), tuple(state[name].shape)) == (f"torch.{dtype}", bits.shape)
        assert bits_in(state[name], dtype, bits.shape) == bits.tobytes()


def breaking(chance: random.Random, how_often: float) -> Any:
    """Return a function that breaks some reads: an error, a short buffer, a flipped bit, other bytes."""

    def broken(number: int, key: str, found: list[Buffer]) -> list[Buffer]:
        if chance.random() >= how_often or not found:
            return found
        which = chance.randrange(len(found))
        victim = bytearray(found[which])
        match chance.randrange(5):
            case 0:
                raise StoreUnavailable("on purpose")
            case 1:
                victim = victim[:-1]
            case 2 if victim:
                victim[chance.randrange(len(victim))] ^= 1 << chance.randrange(8)
            case 3:
                victim = bytearray(len(victim))
            case 4:
                victim = victim + b"x"
        return [*found[:which], victim, *found[which + 1 :]]

    return broken


@given(CHANCES, st.data())
def test_with_faulty_sources_a_restore_is_exact_or_a_clear_error(chance, data):
    store = MemoryStore()
    history = write_history(chance, store, draw_tensors(data, chance), 3)
    how_often = data.draw(st.sampled_from([0.05, 0.3, 0.8]))
    stores = [
        Unsteady(copy_store(store), breaking(chance, how_often)) for _ in range(data.draw(st.integers(1, 3)))
    ]
    sources = [StoreSource(one, f"tier{number}") for number, one in enumerate(stores)]
    newest = data.draw(st.booleans())
    try:
        loaded = load(sources, None if newest else 3, ReadPolicy(num_threads=1))
    except CheckpointError:
        return
    assert_state(loaded.state, history[loaded.manifest.step - 1].tensors)
    skipped = [fallback.step for fallback in loaded.report.fallbacks]
    assert skipped == list(range(3, loaded.manifest.step, -1)) if newest else not skipped


@given(CHANCES, st.data())
def test_what_one_source_has_lost_is_had_from_another_and_the_report_says_so(chance, data):
    near = MemoryStore("near")
    history = write_history(chance, near, draw_tensors(data, chance), 2)
    far = copy_store(near, "far")
    packs = [entry.key for entry in near.list("packs/")]
    for key in chance.sample(packs, chance.randint(1, len(packs))):
        good = bytearray(near.read(key)[0])
        near.put(key, b"" if chance.random() < 0.5 else bytes(len(good)))
    loaded = load([StoreSource(near, "near"), StoreSource(far, "far")])
    assert loaded.manifest.step == 2 and not loaded.report.fallbacks
    assert_state(loaded.state, history[1].tensors)
    assert {detour.source for detour in loaded.report.detours} <= {"near"}
    if loaded.report.detours:
        assert loaded.report.bytes_by_source["far"] > 0
    assert sum(loaded.report.bytes_by_source.values()) == loaded.report.num_bytes
