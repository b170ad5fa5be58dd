"""Any box, whichever way: foreign tensors as global ones and back; random states under random layouts."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import checkpoint
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.assembling import Assembled
from checkpoint.interop.conversion.casting import cast, reference_cast
from checkpoint.interop.conversion.contract import ConversionSettings
from checkpoint.interop.conversion.moving import source_part, target_part
from checkpoint.interop.conversion.outbound import Outbound
from checkpoint.interop.conversion.proving import prove
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.interop.conversion.sharing import share_of_rank
from checkpoint.interop.formats.contract import About
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.moves import Foreign
from checkpoint.interop.reference import account_by_rules
from checkpoint.interop.rules import plan_import
from checkpoint.interop.writing import plan_export
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of, save_state
from tests.interop_samples import disperse, fingerprints, slices, specs_for
from tests.unit.test_interop_builtin import MATRIX, content

SETTINGS = ConversionSettings()
NUM_SPOILED = 4
AXES = ("replica", "shard", "tensor", "pipeline", "context")
LAYOUTS = st.dictionaries(st.sampled_from(AXES), st.integers(1, 5), min_size=1, max_size=3).map(
    lambda axes: [f"{axis}={ranks}" for axis, ranks in axes.items()]
)


class Arrays:
    """A foreign checkpoint of arrays of bits."""

    def __init__(self, tensors, arrays) -> None:
        self.about, self.tensors, self.arrays = About("arrays"), tensors, arrays

    def read(self, number, box):
        return np.array(self.arrays[number][slices(box)])


class Globals:
    """Global tensors of arrays of bits."""

    def __init__(self, specs, tensors) -> None:
        self.tensors, self.arrays = specs, [tensors[one.name] for one in specs]

    def read(self, wishes):
        return [np.array(self.arrays[number][slices(box)]) for number, box in wishes]


@st.composite
def boxes(draw, shape):
    """Draw a box that is not empty."""
    start, size = [], []
    for length in shape:
        begin = draw(st.integers(0, length - 1))
        start.append(begin)
        size.append(draw(st.integers(1, length - begin)))
    return Box(tuple(start), tuple(size))


@cache
def planned(case):
    """Return the global tensors of a case of the matrix, the plan of their export, and what it comes to."""
    name, sizes, axes = MATRIX[case]
    tensors = content(name, sizes)
    plan = plan_export(builtin_rules(name), sizes, axes, specs_for(tensors))
    return tensors, plan, disperse(plan, tensors)


def accounted(case):
    """Return what the reference tells of the foreign tensors of a case."""
    name, sizes, axes = MATRIX[case]
    return account_by_rules(builtin_rules(name), sizes, axes, dict(enumerate(planned(case)[1].foreign)))


@pytest.mark.parametrize("case", range(0, len(MATRIX), 2))
@settings(max_examples=25)
@given(data=st.data())
def test_any_box_of_any_rule_set_is_read_and_written_as_the_whole_is(case, data):
    tensors, plan, shards = planned(case)
    assembled = Assembled(Arrays(plan.foreign, shards), plan)
    number = data.draw(st.integers(0, len(plan.tensors) - 1))
    box = data.draw(boxes(plan.tensors[number].shape))
    whole = tensors[plan.tensors[number].name]
    assert np.array_equal(assembled.read([(number, box)])[0], whole[slices(box)])

    outbound = Outbound(Globals(plan.tensors, tensors), plan, About("arrays"))
    number = data.draw(st.integers(0, len(plan.foreign) - 1))
    box = data.draw(boxes(plan.foreign[number].shape))
    assert np.array_equal(outbound.read(number, box), shards[number][slices(box)])

    move = data.draw(st.sampled_from(plan.moves))
    part = data.draw(boxes(move.target_box.size)).moved(
        (0,) * len(move.target_box.size), move.target_box.start
    )
    assert target_part(move, source_part(move, part)) == part


@pytest.mark.parametrize("case", range(0, len(MATRIX), 2))
def test_the_foreign_side_alone_comes_to_the_global_fingerprints(case):
    tensors, plan, shards = planned(case)
    account = accounted(case)
    assert prove(account, Arrays(plan.foreign, shards), SETTINGS) == fingerprints(tensors)
    for move in plan.moves[:: len(plan.moves) // NUM_SPOILED]:
        if move.source_box.numel > 1:
            spoiled = [array.copy() for array in shards]
            spoiled[move.source][tuple(start for start in move.source_box.start)] ^= 1
            try:
                found = prove(account, Arrays(plan.foreign, spoiled), SETTINGS)
            except Mismatch:
                continue  # one of several copies
            assert found != fingerprints(tensors)


AVERAGED = """
rules: 1
name: averaged
map:
  - {from: mean, to: mean, axes: {tensor: mean}}
  - {from: half, to: half, axes: {tensor: 0}, dtype: bfloat16}
"""


def test_averages_and_casts_are_proved_by_the_rule_applied_anew():
    rules = read_rules(AVERAGED, "averaged", lambda name: "")
    values = torch.randn(3, 8, 5)
    shards = [
        (
            Foreign(name, "float32", (8, 5), {"tensor": rank}),
            values[rank].view(torch.int32).numpy().view("<u4"),
        )
        for rank in range(3)
        for name in ("mean", "half")
    ]
    source = Arrays([one for one, _ in shards], [bits for _, bits in shards])
    plan = plan_import(rules, {}, {"tensor": 3}, source.tensors)
    assembled = Assembled(source, plan)
    numbers = {spec.name: number for number, spec in enumerate(plan.tensors)}
    mean = assembled.read([(numbers["mean"], Box.whole((8, 5)))])[0].view("f4")
    assert np.array_equal(mean, values.double().mean(0).float().numpy())
    half = assembled.read([(numbers["half"], Box.whole((24, 5)))])[0]
    assert np.array_equal(half, values.reshape(24, 5).bfloat16().view(torch.int16).numpy().view("<u2"))
    account = account_by_rules(rules, {}, {"tensor": 3}, dict(enumerate(source.tensors)))
    proved = prove(account, source, SETTINGS)
    for name, bits in (("mean", mean.view("<u4")), ("half", half)):
        stored = torch.from_numpy(np.ascontiguousarray(bits).view(f"i{bits.itemsize}"))
        assert proved[name] == checkpoint.fingerprint_tensor(stored)


FLOATS = st.sampled_from(["float16", "bfloat16", "float32", "float64"])


@given(
    st.lists(st.integers(0, 4), max_size=3).flatmap(
        lambda shape: arrays(np.float32, tuple(shape), elements=st.floats(width=32))
    ),
    FLOATS,
    FLOATS,
)
@example(np.zeros((), np.float32), "float32", "bfloat16")
@example(np.zeros((), np.float64), "float64", "bfloat16")
@example(np.zeros((0, 2), np.float32), "float32", "float16")
def test_both_casts_agree_on_every_value_of_every_shape(values, old, new):
    tensor = torch.from_numpy(values).to(getattr(torch, old))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    bits = tensor.view(integers).numpy().view(f"<u{tensor.itemsize}")
    if old != new:
        made, wanted = cast(bits, old, new), reference_cast(bits, old, new)
        assert made.shape == wanted.shape == values.shape
        assert np.array_equal(made, wanted)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "int64", "uint8", "bool", "complex64", "complex128"]),
            st.lists(st.integers(0, 6), max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    LAYOUTS,
    st.integers(0, 3),
)
@example([("float32", [7, 3]), ("float32", [8])], ["replica=3", "tensor=2"], 1)
@example([("float32", [5, 3]), ("float32", [6]), ("float32", [4, 4])], ["replica=5", "pipeline=2"], 1)
def test_a_random_state_survives_a_random_layout(kinds, axes, zero):
    axes = [one if one[:-1] != "pipeline=" else f"pipeline={min(int(one[-1]), len(kinds))}" for one in axes]
    layout = ",".join(axes) + (
        f",zero={zero}" if zero and any(one.startswith("replica") for one in axes) else ""
    )
    torch.manual_seed(2)
    tensors = {
        f"layers.{number}.t{number}": torch.randint(0, 2, shape).to(getattr(torch, dtype))
        for number, (dtype, shape) in enumerate(kinds)
    }
    moments = {
        name: {"step": torch.tensor(3.0), "exp_avg": torch.randn(one.shape), "exp_avg_sq": one.clone()}
        for name, one in tensors.items()
    }
    first, others = tensors["layers.0.t0"], [one for state in moments.values() for one in state.values()]
    source, target = MemoryStore("source"), MemoryStore("target")
    nested = [first, {"deep": (1, None, b"x")}]
    save_state(source, {"model": tensors, "optimizer": {"state": moments}, "nested": nested})
    reshard(source, target, Change(to=layout))
    assert bits_of(target) == bits_of(source)
    needed = sum(one.nbytes for one in [*tensors.values(), *others])
    assert share_of_rank(target, "replica=1", 0).num_bytes == needed
    assert checkpoint.load(target).state["nested"][1] == {"deep": (1, None, b"x")}
