"""Checkpoints that do not keep the rules: an error names tensor and rank. And what rules can say."""

import numpy as np
import pytest

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import CheckpointError, FormatError, Incomplete, Mismatch
from checkpoint.format.layout import Box
from checkpoint.interop.conversion.proving import changed
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.moves import Foreign, How, Plan
from checkpoint.interop.reference import account_by_rules
from checkpoint.interop.rules import plan_import
from checkpoint.interop.writing import plan_export
from tests.interop_samples import (
    Files,
    assemble,
    check_agreed,
    check_equal,
    disperse,
    fingerprints,
    proved,
    random_bits,
    slices,
    specs_for,
)


def tensor(name: str, *shape: int, dtype: str = "float32", **at: int) -> Foreign:
    return Foreign(name, dtype, shape, at)


def planned(document: str, foreign: list[Foreign], **axes: int):
    rules = read_rules("rules: 1\n" + document, "mine.yaml")
    plan = plan_import(rules, {}, axes, foreign)
    check_agreed(rules, {}, axes, plan)
    return plan


def changed_by(document: str, plan: Plan, **axes: int) -> set[str]:
    rules = read_rules("rules: 1\n" + document, "mine.yaml")
    account = account_by_rules(rules, {}, axes, dict(enumerate(plan.foreign)))
    return changed(account, Files(plan.foreign, lambda _: np.zeros(0)))


def marks_of(document: str, plan: Plan, arrays: list[np.ndarray], **axes: int) -> dict[str, int]:
    rules = read_rules("rules: 1\n" + document, "mine.yaml")
    return proved(rules, {}, axes, plan.foreign, arrays.__getitem__)


# ------------------------------------------------------------------------------------------- exactly once


def test_a_name_that_no_rule_or_two_rules_match_is_an_error():
    with pytest.raises(Mismatch, match=r"no rule of mine.yaml matches 'b'"):
        planned("map: [{from: a, to: x}]", [tensor("a", 2), tensor("b", 2)])
    with pytest.raises(
        Mismatch, match=r"'a1' is matched by the rule of line 2 \(a\{n\}\) and the rule of line 2"
    ):
        planned("map: [{from: 'a{n}', to: 'x{n}'}, {from: a1, to: y}]", [tensor("a1", 2)])


def test_a_global_tensor_that_two_names_fill_is_an_error():
    with pytest.raises(Mismatch, match=r"'x' is filled twice: from a by .*, and from b by"):
        planned("map: [{from: a, to: x}, {from: b, to: x}]", [tensor("a", 2), tensor("b", 2)])
    with pytest.raises(Mismatch, match="'x' is filled twice"):
        planned("map: [{from: '{any:a|b}', to: x}]", [tensor("a", 2), tensor("b", 2)])


def test_a_stack_with_a_hole_is_an_error():
    document = "map: [{from: 'a.{n}', to: x, stack: {dim: 0, number: n, count: 3}}]"
    planned(document, [tensor(f"a.{n}", 2) for n in range(3)])
    with pytest.raises(Incomplete, match="'x'"):
        planned(document, [tensor("a.0", 2), tensor("a.2", 2)])
    with pytest.raises(Mismatch, match="'3' is none of the 3 numbers"):
        planned(document, [tensor("a.3", 2)])


def test_what_is_declared_has_to_be_there_in_its_shape_and_nothing_else():
    document = (
        "map: [{from: '{name:.*}', to: '{name}'}]\ntensors: [{name: 'x.{n}', each: {n: 2}, shape: [2, 3]}]"
    )
    planned(document, [tensor("x.0", 2, 3), tensor("x.1", 2, 3)])
    with pytest.raises(Incomplete, match=r"1 of the 2 tensors of mine.yaml are not .*\['x.1'\]"):
        planned(document, [tensor("x.0", 2, 3)])
    with pytest.raises(Mismatch, match=r"'x.1' has the shape \(3, 2\); .* should be \(2, 3\)"):
        planned(document, [tensor("x.0", 2, 3), tensor("x.1", 3, 2)])
    with pytest.raises(Mismatch, match=r"mine.yaml has no tensor 'y'"):
        planned(document, [tensor("x.0", 2, 3), tensor("x.1", 2, 3), tensor("y", 1)])


@pytest.mark.parametrize(
    ("use", "there", "message"),
    [
        ("same", [0, 1], "a copy of it should be at tensor=2"),
        ("mean", [0, 2], "a copy of it should be at tensor=1"),
        ("first", [0, 1], "it is at tensor=1 a second time"),
        ("first", [1], "a copy of it should be at tensor=0"),
        ("last", [0], "a copy of it should be at tensor=2"),
        ("ends", [0], "a copy of it should be at tensor=2"),
        ("one", [0, 1], "it is at tensor=1 a second time"),
        ("0", [0, 2], r"nothing of it is there from tensor ranks \[1\]"),
    ],
)
def test_the_ranks_that_a_rule_speaks_of_have_to_be_those_that_are_there(use, there, message):
    shards = [tensor("a", 4, tensor=rank) for rank in there]
    with pytest.raises(CheckpointError, match=message):
        planned(f"map: [{{from: a, to: x, axes: {{tensor: {use}}}}}]", shards, tensor=3)


def test_an_axis_that_no_rule_speaks_of_is_an_error():
    with pytest.raises(FormatError, match="does not say what the 2 ranks of the axis 'expert' hold"):
        planned("map: [{from: a, to: x}]", [tensor("a", 4, expert=rank) for rank in range(2)], expert=2)


def test_ranks_that_do_not_fit_together_are_an_error():
    document = "map: [{from: a, to: x, axes: {tensor: 0, replica: same}}]"
    shards = [tensor("a", 2, 3, tensor=0, replica=0), tensor("a", 2, 4, tensor=1, replica=0)]
    with pytest.raises(Mismatch, match="the ranks do not agree on dim 1"):
        planned(document, shards, tensor=2, replica=1)
    shards = [tensor("a", 2, tensor=0, dtype="float32"), tensor("a", 2, tensor=1, dtype="float64")]
    with pytest.raises(Mismatch, match=r"float64 of shape \(4,\); the others make it float32"):
        planned("map: [{from: a, to: x, axes: {tensor: 0}}]", shards, tensor=2)
    with pytest.raises(Mismatch, match="has 2 along dim 0, not 3"):
        planned("map: [{from: a, to: x, axes: {tensor: {dim: 0, size: 3}}}]", [tensor("a", 2)])


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        ("transpose: [1, 0], to: x", (2,)),
        ("to: 'x{n}', unstack: {dim: 1, number: n, count: 2}", (2,)),
        ("to: 'x{n}', unstack: {dim: 0, number: n, count: 3}", (2, 2)),
        ("split: {dim: 1, pieces: [{to: x}, {to: y}]}", (2,)),
        ("split: {dim: 0, pieces: [{to: x}, {to: y}]}", (3,)),
        ("split: {dim: 0, pieces: [{to: x, size: 1}, {to: y, size: 1}]}", (3,)),
        ("split: {dim: 0, repeat: 2, pieces: [{to: x, size: 2}, {to: y}]}", (2,)),
        ("split: {dim: 0, repeat: 0, pieces: [{to: x}]}", (2,)),
    ],
)
def test_a_shape_that_a_rule_does_not_fit_is_an_error(rule: str, shape: tuple[int, ...]):
    with pytest.raises(Mismatch, match="a has the shape"):
        planned(f"map: [{{from: a, {rule}}}]", [tensor("a", *shape)])


# --------------------------------------------------------------------------------- what rules can express


def test_key_and_value_heads_that_neighbours_share_are_copies():
    """Fewer key heads than tensor ranks: two ranks hold the same one."""
    document = """
sizes: {heads: 4, kv: 2}
map:
  - from: qk
    axes: {tensor: 0}
    split:
      dim: 0
      pieces:
        - {to: q, size: "share(heads, tensor)"}
        - {to: k, size: 1, axes: {tensor: {dim: 0, copies: ranks(tensor) // kv}}}
"""
    q, k = random_bits((4,), 1), random_bits((2,), 2)
    arrays = [np.concatenate([q[rank : rank + 1], k[rank // 2 : rank // 2 + 1]]) for rank in range(4)]
    plan = planned(document, [tensor("qk", 2, tensor=rank) for rank in range(4)], tensor=4)
    found = assemble(plan, arrays)
    assert (found["q"] == q).all()
    assert (found["k"] == k).all()
    assert [move.how for move in plan.moves].count(How.SAME) == 2
    written = plan_export(
        read_rules("rules: 1\n" + document, "mine.yaml"), {}, {"tensor": 4}, specs_for(found)
    )
    assert all((a == b).all() for a, b in zip(disperse(written, found), arrays, strict=True))
    arrays[3][1] += 1
    with pytest.raises(Mismatch, match=r"'k': the copies in qk \(tensor=2\) and qk \(tensor=3\) differ"):
        marks_of(document, plan, arrays, tensor=4)


@pytest.mark.parametrize("home", [0, 1, 2])
def test_what_one_rank_has_alone_is_read_from_any_and_written_on_the_first(home):
    document = "map: [{from: '{name}', to: '{name}', axes: {pipeline: one, tensor: 0}}]"
    whole = {"x": random_bits((4, 3), 1), "y": random_bits((2,), 2)}
    homes = {"x": home, "y": 2 - home}
    places = [(name, rank) for name in whole for rank in range(2)]
    shards = [
        tensor(name, *np.split(whole[name], 2)[rank].shape, tensor=rank, pipeline=homes[name])
        for name, rank in places
    ]
    arrays = [np.split(whole[name], 2)[rank] for name, rank in places]
    plan = planned(document, shards, tensor=2, pipeline=3)
    found = assemble(plan, arrays)
    assert found.keys() == whole.keys() and all((found[name] == whole[name]).all() for name in whole)
    assert marks_of(document, plan, arrays, tensor=2, pipeline=3) == fingerprints(whole)
    written = exported(document, *specs_for(whole), tensor=2, pipeline=3)
    assert [(one.name, one.at["tensor"], one.at["pipeline"]) for one in written.foreign] == [
        (*place, 0) for place in places
    ]
    assert all((one == other).all() for one, other in zip(disperse(written, found), arrays, strict=True))


def test_an_averaged_tensor_is_the_mean_and_is_told_as_changed():
    document = "map: [{from: a, to: x, axes: {tensor: mean}}, {from: b, to: y, axes: {tensor: same}}]"
    plan = planned(
        document,
        [tensor(name, 2, tensor=rank) for name in "ab" for rank in range(3)],
        tensor=3,
    )
    values = [np.array([rank, 4 * rank], np.float32).view(np.uint32) for rank in range(3)]
    copies = [np.array([5, 6], np.uint32)] * 3
    found = assemble(plan, values + copies)
    assert found["x"].view(np.float32).tolist() == [1, 4]
    assert changed_by(document, plan, tensor=3) == {"x"}
    assert marks_of(document, plan, values + copies, tensor=3) == fingerprints(found)
    with pytest.raises(FormatError, match="has copies over other axes as well"):
        planned(
            "map: [{from: a, to: x, axes: {tensor: mean, expert: same}}]",
            [tensor("a", 2, tensor=t, expert=e) for t in range(2) for e in range(2)],
            tensor=2,
            expert=2,
        )


def test_a_cast_is_a_change_of_values_and_says_so():
    document = "map: [{from: a, to: x, dtype: bfloat16}, {from: b, to: y}]"
    plan = planned(document, [tensor("a", 2), tensor("b", 2)])
    assert plan.tensors == (TensorSpec("x", "bfloat16", (2,)), TensorSpec("y", "float32", (2,)))
    assert changed_by(document, plan) == {"x"}


def test_an_optimizer_follows_its_parameter_through_a_split_and_its_step_goes_to_all_pieces():
    document = """
map: [{from: qkv, split: {dim: 0, pieces: [{to: q}, {to: k}]}}]
states:
  - {from: "opt.{param}.{state:m|v}", to: "{state}/{param}", dtype: float32}
  - {from: "opt.{param}.step", to: "step/{param}", single: true}
"""
    foreign = [tensor("qkv", 4), tensor("opt.qkv.m", 4), tensor("opt.qkv.v", 4), tensor("opt.qkv.step")]
    plan = planned(document, foreign)
    assert {spec.name: spec.shape for spec in plan.tensors} == {
        **{f"{kind}{name}": (2,) for kind in ("", "m/", "v/") for name in "qk"},
        **{f"step/{name}": () for name in "qk"},
    }
    with pytest.raises(Mismatch, match=r"no rule of mine.yaml matches 'opt.other.v'"):
        planned(document, [tensor("qkv", 4), tensor("opt.other.v", 4)])
    with pytest.raises(Mismatch, match="where one number for a parameter should be"):
        planned(document, [tensor("qkv", 4), tensor("opt.qkv.step", 4)])


def test_a_tensor_without_elements_is_still_there():
    plan = planned("map: [{from: a, to: x}]", [tensor("a", 0, 3)])
    assert (plan.tensors, plan.moves) == ((TensorSpec("x", "float32", (0, 3)),), ())


def test_a_rank_whose_part_is_empty_takes_no_room():
    document = (
        "sizes: {n: [2, 0, 1]}\nmap: [{from: a, to: x, axes: {tensor: {dim: 0, size: 'share(n, tensor)'}}}]"
    )
    shards = [tensor("a", size, tensor=rank) for rank, size in enumerate((2, 0, 1))]
    plan = planned(document, shards, tensor=3)
    assert [move.target_box for move in plan.moves] == [Box((0,), (2,)), Box((2,), (1,))]


def test_padding_is_cut_off_listed_and_written_as_zeros():
    document = "map: [{from: a, to: x, axes: {tensor: 0}, pad: {dim: 0, real: 5, total: 9}}]"
    plan = planned(document, [tensor("a", 3, tensor=rank) for rank in range(3)], tensor=3)
    assert plan.padding == ((1, Box((2,), (1,))), (2, Box((0,), (3,))))
    values = np.arange(1, 6, dtype=np.uint32)
    assert [bits.tolist() for bits in disperse(plan, {"x": values})] == [[1, 2, 3], [4, 5, 0], [0, 0, 0]]
    covered = np.zeros(9, int)
    for source, box in [*((move.source, move.source_box) for move in plan.moves), *plan.padding]:
        covered[3 * source : 3 * source + 3][slices(box)] += 1
    assert covered.tolist() == [1] * 9
    with pytest.raises(Mismatch, match=r"dim 0 of \(9,\) should have 10 = 10 real"):
        planned(
            document.replace("real: 5", "real: 10"),
            [tensor("a", 3, tensor=rank) for rank in range(3)],
            tensor=3,
        )


# ------------------------------------------------------------------------------------------------- writing


def exported(document: str, *tensors: TensorSpec, **axes: int):
    return plan_export(read_rules("rules: 1\n" + document, "mine.yaml"), {}, axes, tensors)


def test_what_cannot_be_written_says_so():
    x, y = TensorSpec("x", "float32", (3,)), TensorSpec("y", "float32", (3,))
    with pytest.raises(Mismatch, match=r"no rule of mine.yaml would write 'y'"):
        exported("map: [{from: a, to: x}]", x, y)
    with pytest.raises(Mismatch, match=r"and the rule of line 2 .* would write 'x'"):
        exported("map: [{from: a, to: x}, {from: b, to: x}]", x)
    with pytest.raises(Incomplete, match=r"needs \['y'\] beside \['x'\]"):
        exported("map: [{from: a, split: {dim: 0, pieces: [{to: x}, {to: y}]}}]", x)
    with pytest.raises(Mismatch, match=r"dim 0 of x has 3 elements, which 2 equal parts do not divide"):
        exported("map: [{from: a, to: x, axes: {tensor: 0}}]", x, tensor=2)
    with pytest.raises(Mismatch, match=r"do not tell its captures \['n'\]"):
        exported("map: [{from: 'a{n}', to: x}]", x)
    with pytest.raises(Incomplete, match=r"also needs \['x.1'\]"):
        exported(
            "map: [{from: a, to: 'x.{n}', unstack: {dim: 0, number: n, count: 2}}]",
            TensorSpec("x.0", "float32", (3,)),
        )
    with pytest.raises(Mismatch, match=r"'x' of shape \(3,\) would come back as \(2,\)"):
        exported("map: [{from: a, to: x, pad: {dim: 0, real: 2, total: 3}}]", x)


def test_equal_pieces_in_turns_are_written_as_they_are_read():
    document = "map: [{from: a, axes: {tensor: 0}, split: {dim: 0, repeat: 2, pieces: [{to: x}, {to: y}]}}]"
    tensors = {"x": np.arange(4, dtype=np.uint32), "y": np.arange(4, 8, dtype=np.uint32)}
    plan = exported(document, *specs_for(tensors), tensor=2)
    assert [bits.tolist() for bits in disperse(plan, tensors)] == [[0, 4, 1, 5], [2, 6, 3, 7]]


def test_a_comparison_names_what_is_missing_or_new():
    with pytest.raises(Mismatch, match=r"missing in the target: \['a'\], or new in it: \['b'\]"):
        check_equal({"a": 1}, {"b": 1})
