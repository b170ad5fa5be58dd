"""Any plain state survives being taken apart, written as JSON and put together again."""

import json
import math
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import FormatError
from checkpoint.format.tree import flatten, leaf_names, unflatten


class Leaf:
    """Stands for a tensor."""


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=8),
    st.complex_numbers(),
    st.builds(Leaf),
)
plain_keys = st.one_of(
    st.text(max_size=4), st.just("$"), st.integers(), st.booleans(), st.none(), st.binary(max_size=2)
)
keys = st.one_of(plain_keys, st.tuples(plain_keys, plain_keys))
states = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "b", "a/b", "0"]), inner, max_size=4),
    ),
    max_leaves=20,
)


def same(one: object, other: object) -> bool:
    """Equal in type and value; leaves by identity, NaN like NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return (math.copysign(1, one) == math.copysign(1, other) and (one == other)) or (
            one != one and other != other
        )
    if isinstance(one, complex) and isinstance(other, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    return one is other if isinstance(one, Leaf) else one == other


@given(states)
def test_what_was_taken_apart_is_put_together_the_same(state):
    flat = flatten(state, lambda value: isinstance(value, Leaf))
    skeleton = json.loads(json.dumps(flat.skeleton, allow_nan=False))
    assert same(unflatten(skeleton, flat.leaves), state)
    assert set(leaf_names(skeleton)) == set(flat.leaves)


@given(
    st.recursive(
        st.one_of(
            st.none(), st.integers(), st.text(max_size=3), st.sampled_from(["tensor", "tuple", "dict", "int"])
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["$", "items", "name", "hex", "value", "parts", "base64"]), inner, max_size=3
            ),
        ),
        max_leaves=12,
    )
)
def test_a_hostile_skeleton_is_refused_or_read_but_never_breaks(skeleton):
    with suppress(FormatError):
        unflatten(skeleton, {})
