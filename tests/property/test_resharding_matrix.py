"""From any layout into any other and back: weights, moments, step, cursor and the next step, bit for bit."""

import random
from functools import cache
from itertools import product

import numpy as np
import pytest

import checkpoint
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of, save_state
from tests.resharding_matrix import (
    CURSOR,
    LAYOUTS,
    MODELS,
    assert_same_memory,
    cut_memory,
    make_truth,
    restore,
    save,
)
from tests.resharding_training import next_step

TRIPLES = [(model, *pair) for model in MODELS for pair in product(LAYOUTS, LAYOUTS) if pair[0] != pair[1]]
NUM_SAMPLED, NUM_FAST = 40, 4


def sampled() -> list[tuple[str, str, str]]:
    """Return some of the triples, in which every layout is a source and a target at least twice."""
    chance, names, models = random.Random(11), list(LAYOUTS), list(MODELS)
    rings = [chance.sample(names, len(names)) for _ in range(2)]
    pairs = [pair for ring in rings for pair in zip(ring, [*ring[1:], ring[0]], strict=True)]
    some = [(models[number % len(models)], *pair) for number, pair in enumerate(pairs)]
    rest = [one for one in TRIPLES if one not in some]
    return list(dict.fromkeys(some)) + chance.sample(rest, NUM_SAMPLED - len(set(some)))


SAMPLE = [
    pytest.param(*one, marks=[pytest.mark.slow] if number >= NUM_FAST else [])
    for number, one in enumerate(sampled())
]

truth_of = cache(make_truth)


@cache
def never_converted(model: str) -> dict[str, bytes]:
    """Return the next step of the training that was never taken into any layout."""
    return next_step(truth_of(model).store)


@cache
def saved(model: str, name: str):
    """Return a checkpoint that the ranks of a layout have written, each what it holds."""
    truth = truth_of(model)
    layout = truth.layout(LAYOUTS[name])
    memories = [cut_memory(truth, layout, rank) for rank in layout.mesh.members]
    return save(truth, layout, LAYOUTS[name], memories)


def check(model: str, source: str, target: str) -> None:
    """Take a state from one layout into another by every way there is."""
    truth, old = truth_of(model), saved(model, source)
    layout = truth.layout(LAYOUTS[target])
    memories = restore(truth, old, layout)
    for rank, memory in zip(layout.mesh.members, memories, strict=True):
        assert_same_memory(memory, cut_memory(truth, layout, rank))
    new = save(truth, layout, LAYOUTS[target], memories)
    resharded = MemoryStore("resharded")
    reshard(old, resharded, Change(to=LAYOUTS[target], rules=truth.rules))
    for store in (new, resharded):
        assert bits_of(store) == bits_of(truth.store)
        manifest = checkpoint.Catalog(store).manifest(9)
        assert (manifest.tensors, manifest.data_cursor) == (truth.manifest.tensors, CURSOR)
        state = checkpoint.load(store).state
        assert state["cursor"] == CURSOR
        assert next_step(store) == never_converted(model), "the next loss, and the weights after it"
        if model != "Llama":
            assert state["model"]["head.weight"] is state["model"]["embedding.weight"], "tied, as before"


@pytest.mark.parametrize(("model", "source", "target"), SAMPLE)
def test_a_state_survives_a_change_of_layout(model, source, target):
    check(model, source, target)


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
def test_a_state_survives_every_change_of_layout(model):
    for one, source, target in TRIPLES:
        if one == model:
            check(model, source, target)


@pytest.mark.parametrize("model", MODELS)
def test_the_next_step_tells_every_part_of_a_state(model):
    """Or its equality would prove little: each weight has a gradient, and changes by it."""
    truth = truth_of(model)
    state = checkpoint.load(truth.store).state
    before, after = state["model"], never_converted(model)
    assert np.isfinite(np.frombuffer(after["the loss"], np.float32)).all()
    for name, weight in before.items():
        assert weight.numpy().tobytes() != after[name], name
    for name in state["optimizer"]["state"]:
        state["optimizer"]["state"][name]["exp_avg"][..., -1] += 1
    shifted = MemoryStore("shifted")
    save_state(shifted, state, step=9)
    assert all(one != after[name] for name, one in next_step(shifted).items() if name != "the loss")


def test_layouts_pad_what_they_cannot_divide():
    truth = truth_of("GPT")
    layout = truth.layout("replica=5,zero=1,align=4")
    parts = [cut_memory(truth, layout, rank).buffers[0] for rank in layout.mesh.members]
    assert len({len(part) for part in parts}) == 1
    real = sum(array.size for name, array in truth.arrays.items() if name.endswith("exp_avg"))
    assert sum(map(len, parts)) > real, "there is padding"
    assert parts[-1][-1] == 2**32 - 1, "which nobody restores"


def test_the_vocabulary_is_divided_as_if_it_were_padded():
    truth = truth_of("GPT")
    layout = truth.layout("tensor=4")
    rows = [cut_memory(truth, layout, rank).tensors["model/embedding.weight"].shape[0] for rank in range(4)]
    assert rows == [4, 4, 4, 1], "13 words, padded to 16"
