"""Names, tied tensors, and states that cannot be stored."""

import enum
from collections import OrderedDict

import numpy as np
import pytest

from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.tree import flatten, leaf_names, unflatten


class Leaf:
    """Stands for a tensor."""


def is_leaf(value: object) -> bool:
    return isinstance(value, Leaf)


def test_leaves_are_named_by_their_paths():
    state = {
        "model": OrderedDict({"blocks.0.attn.qkv.weight": Leaf()}),
        "optimizer": {
            "state": {"blocks.0.attn.qkv.weight": {"exp_avg": Leaf()}},
            "groups": [{"lr": (Leaf(), 3)}],
        },
    }
    assert list(flatten(state, is_leaf).leaves) == [
        "model/blocks.0.attn.qkv.weight",
        "optimizer/state/blocks.0.attn.qkv.weight/exp_avg",
        "optimizer/groups/0/lr/0",
    ]


def test_a_leaf_alone_has_a_name_too():
    leaf = Leaf()
    flat = flatten(leaf, is_leaf)
    assert flat.leaves == {"value": leaf}
    assert unflatten(flat.skeleton, flat.leaves) is leaf


def test_tied_leaves_are_stored_once_and_tied_again():
    shared = Leaf()
    flat = flatten({"embedding": shared, "head": shared, "other": Leaf()}, is_leaf)
    assert list(flat.leaves) == ["embedding", "other"]
    assert list(leaf_names(flat.skeleton)) == ["embedding", "embedding", "other"]
    state = unflatten(flat.skeleton, flat.leaves)
    assert state["head"] is state["embedding"] is shared


def test_the_caller_says_what_makes_two_leaves_one():
    flat = flatten([Leaf(), Leaf()], is_leaf, key=lambda leaf: "all the same")
    assert list(flat.leaves) == ["0"]


def test_paths_that_look_alike_get_different_names():
    state = {"a/b": Leaf(), "a": {"b": Leaf()}, 1: Leaf(), "1": Leaf()}
    flat = flatten(state, is_leaf)
    assert list(flat.leaves) == ["a/b", "a/b~2", "1", "1~2"]
    assert unflatten(flat.skeleton, flat.leaves) == state


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, np.float64(1), np.zeros(2), Color.RED, range(3), lambda: 0]
)
def test_what_cannot_be_stored_is_refused_by_path_and_type(value: object):
    with pytest.raises(Unsupported, match="optimizer/groups/0") as caught:
        flatten({"optimizer": {"groups": [value]}}, is_leaf)
    assert type(value).__qualname__ in str(caught.value)


def test_a_state_that_holds_itself_is_refused():
    state: dict[str, object] = {}
    state["again"] = state
    with pytest.raises(FormatError, match=r"again/again/again/again/\.\.\. is nested deeper than 64"):
        flatten(state, is_leaf)


def test_the_deepest_state_that_is_taken_is_also_given_back():
    state: object = 1
    for depth in range(64):
        state = {0: state} if depth % 2 else (state,)
    assert unflatten(flatten(state, is_leaf).skeleton, {}) == state
    with pytest.raises(FormatError, match="deeper than 64"):
        flatten([state], is_leaf)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$": "pickle", "data": "gASVAAAA"},
        {"$": "tensor", "name": "unknown"},
        {"$": "tensor", "name": 3},
        {"$": "tensor", "name": "a", "more": 1},
        {"$": "tuple"},
        {"$": "dict", "items": [1]},
        {"$": "dict", "items": [[[], 1]]},
        {"$": "int", "hex": "0xzz"},
        {"$": "float", "value": "1.0"},
        {"$": "complex", "parts": ["a", 1]},
        {"$": "complex", "parts": [1]},
        {"$": "bytes", "base64": "%"},
        {"$": None},
    ],
)
def test_a_skeleton_that_flatten_would_not_make_is_corrupt(skeleton):
    with pytest.raises(Corrupt):
        unflatten({"state": [skeleton]}, {"a": 1})


def test_a_skeleton_nested_too_deep_is_corrupt():
    skeleton: object = 1
    for _ in range(500):
        skeleton = [skeleton]
    with pytest.raises(Corrupt, match="deeper"):
        unflatten(skeleton, {})  # type: ignore[arg-type]  # that is the point
