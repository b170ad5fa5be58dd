"""From any layout into any other and back: weights, both moments, step and cursor come back bit for bit."""

import random
from functools import cache
from itertools import product

import pytest

import checkpoint
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of
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

TRIPLES = [(model, *pair) for model in MODELS for pair in product(LAYOUTS, LAYOUTS) if pair[0] != pair[1]]
NUM_SAMPLED, NUM_FAST = 40, 4
SAMPLE = [
    pytest.param(*one, marks=[pytest.mark.slow] if number >= NUM_FAST else [])
    for number, one in enumerate(random.Random(11).sample(TRIPLES, NUM_SAMPLED))
]

truth_of = cache(make_truth)


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
