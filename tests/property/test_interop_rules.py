"""Random rules over random shards: the plan puts every element where plain numpy took it from."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError, Incomplete
from checkpoint.interop.expression import Scope, evaluate, parse_expression
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.moves import Foreign
from checkpoint.interop.rules import plan_import
from checkpoint.interop.template import parse_template
from checkpoint.interop.writing import plan_export
from tests.interop_samples import (
    Arrays,
    Shards,
    assemble,
    check_agreed,
    disperse,
    fingerprints,
    foreign,
    proved,
    random_bits,
    specs_for,
)


@dataclass(frozen=True)
class Fusion:
    """A fused weight, cut over tensor ranks (unevenly, along one dim) and replicas: document and shards."""

    document: str
    tensors: Arrays
    shards: Shards
    axes: dict[str, int]


@st.composite
def fusions(draw) -> Fusion:
    """Draw pieces, repetitions, uneven ranks, a transposition; cut them by numpy alone."""
    ndim, ranks, copies = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    split, cut = draw(st.integers(0, ndim - 1)), draw(st.integers(0, ndim - 1))
    order = draw(st.permutations(range(ndim)))
    repeat, num_pieces = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    parts = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks).filter(any))
    if cut != split:
        shape[cut] = sum(parts)
    tensors, sizes = {}, []
    for piece in range(num_pieces):
        if cut == split:
            sizes.append(draw(st.lists(st.integers(1, 3), min_size=ranks, max_size=ranks)))
        else:
            sizes.append([draw(st.integers(1, 3))] * ranks)
        length = repeat * (sum(sizes[-1]) if cut == split else sizes[-1][0])
        tensors[f"piece{piece}"] = random_bits(
            [length if d == split else n for d, n in enumerate(shape)], piece
        )
    shards = []
    for rank in range(ranks):
        locals_ = [
            rank_part(bits, cut, split, repeat, (parts, sizes[n]), rank)
            for n, bits in enumerate(tensors.values())
        ]
        turns = [np.split(local, repeat, split) for local in locals_]
        fused = np.concatenate([turn[j] for j in range(repeat) for turn in turns], split)
        for copy in range(copies):
            stored = fused.transpose(np.argsort(order))
            shards.append(foreign("x.fused", stored, tensor=rank, replica=copy))
    shards = draw(st.permutations(shards))  # files come in any order
    piece_sizes = "\n".join(
        f"  p{n}: {list(size) if cut == split else size[0]}" for n, size in enumerate(sizes)
    )
    piece_size = "share(p{0}, tensor)" if cut == split else "p{0}"
    entries = "\n".join(
        f"        - {{to: piece{n}, size: '{piece_size.format(n)}'}}" for n in range(num_pieces)
    )
    size = "" if cut == split else ', size: "share(parts, tensor)"'
    document = f"""
rules: 1
sizes:
  parts: {parts}
{piece_sizes}
map:
  - from: x.fused
    transpose: {list(order)}
    axes: {{tensor: {{dim: {cut}{size}}}, replica: same}}
    split:
      dim: {split}
      repeat: {repeat}
      pieces:
{entries}
"""
    return Fusion(document, tensors, shards, {"tensor": ranks, "replica": copies})


def rank_part(
    bits: np.ndarray, cut: int, split: int, repeat: int, sizes: tuple[list[int], list[int]], rank: int
):
    """Return what a rank has of one piece: its part of the dim that the ranks divide."""
    lengths = [repeat * size for size in sizes[1]] if cut == split else sizes[0]
    return np.split(bits, np.cumsum(lengths)[:-1], cut)[rank]


@given(fusions())
def test_a_fused_weight_is_taken_apart_as_numpy_put_it_together(fusion):
    rules = read_rules(fusion.document, "random")
    plan = plan_import(rules, {}, fusion.axes, [tensor for tensor, _ in fusion.shards])
    arrays = [bits for _, bits in fusion.shards]
    check_agreed(rules, {}, fusion.axes, plan)
    found = assemble(plan, arrays)
    assert found.keys() == fusion.tensors.keys()
    assert all((found[name] == bits).all() for name, bits in fusion.tensors.items())
    assert proved(rules, {}, fusion.axes, plan.foreign, arrays.__getitem__) == fingerprints(fusion.tensors)


@given(fusions())
def test_a_fused_weight_is_written_as_it_was_read(fusion):
    rules = read_rules(fusion.document, "random")
    plan = plan_export(rules, {}, fusion.axes, specs_for(fusion.tensors))
    written = {
        str(tensor): bits for tensor, bits in zip(plan.foreign, disperse(plan, fusion.tensors), strict=True)
    }
    assert written.keys() == {str(tensor) for tensor, _ in fusion.shards}
    assert all((written[str(tensor)] == bits).all() for tensor, bits in fusion.shards)


@given(fusions(), st.data())
def test_a_shard_that_is_missing_or_too_small_is_never_overlooked(fusion, data):
    rules = read_rules(fusion.document, "random")
    shards = [tensor for tensor, _ in fusion.shards]
    victim = data.draw(st.integers(0, len(shards) - 1))
    if not math.prod(shards[victim].shape):
        return  # what has no elements may be missing
    rest = shards[:victim] + shards[victim + 1 :]
    if rest:
        with pytest.raises(Incomplete):
            plan_import(rules, {}, fusion.axes, rest)
    dim = data.draw(st.integers(0, len(shards[victim].shape) - 1))
    smaller = tuple(n - (d == dim) for d, n in enumerate(shards[victim].shape))
    shards[victim] = Foreign(shards[victim].name, "float32", smaller, shards[victim].at)
    try:
        plan = plan_import(rules, {}, fusion.axes, shards)
    except CheckpointError:
        return
    # the one rank there is may simply have a smaller tensor, if nothing tells the size of that dim
    assert len(shards) == 1
    assert any(spec.shape != fusion.tensors[spec.name].shape for spec in plan.tensors)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.lists(st.integers(1, 3), min_size=2, max_size=2),
)
def test_stacked_layers_are_taken_apart_and_put_together(stages, per_stage, dim, shape):
    document = f"""
rules: 1
sizes: {{layers: {stages * per_stage}}}
numbers: {{layer: layers over pipeline}}
map:
  - from: blocks.w
    to: layers.{{layer}}.w
    unstack: {{dim: {dim}, number: layer, count: "share(layers, pipeline)"}}
  - from: single.{{layer}}.v
    to: stacked.v
    stack: {{dim: {dim}, number: layer, count: layers}}
"""
    layers = stages * per_stage
    tensors = {f"layers.{n}.w": random_bits(shape, n) for n in range(layers)}
    singles = [random_bits(shape, 100 + n) for n in range(layers)]
    tensors["stacked.v"] = np.stack(singles, dim)
    shards: Shards = []
    for stage in range(stages):
        mine = range(stage * per_stage, (stage + 1) * per_stage)
        shards.append(
            foreign("blocks.w", np.stack([tensors[f"layers.{n}.w"] for n in mine], dim), pipeline=stage)
        )
        shards += [foreign(f"single.{n - mine[0]}.v", singles[n], pipeline=stage) for n in mine]
    rules, axes = read_rules(document, "stacked"), {"pipeline": stages}
    plan = plan_import(rules, {}, axes, [tensor for tensor, _ in shards])
    check_agreed(rules, {}, axes, plan)
    found = assemble(plan, [bits for _, bits in shards])
    assert found.keys() == tensors.keys()
    assert all((found[name] == bits).all() for name, bits in tensors.items())
    back = plan_export(rules, {}, axes, specs_for(tensors))
    written = {str(tensor): bits for tensor, bits in zip(back.foreign, disperse(back, tensors), strict=True)}
    assert written.keys() == {str(tensor) for tensor, _ in shards}
    assert all((written[str(tensor)] == bits).all() for tensor, bits in shards)


# ------------------------------------------------------------------------------ expressions and templates

numbers = st.integers(0, 50)


@given(numbers, numbers, numbers)
def test_expressions_are_worked_out_as_python_does(a, b, c):
    scope = Scope({"a": a, "b": b, "c": (c, 1)}, {"tensor": 2}, {"tensor": 1})
    for text in ("a + b * (c - 2)", "-a // (b + 1)", "a % (c + 1)", "min(a, b, 3)", "max(a, 7)"):
        assert evaluate(parse_expression(text), scope) == eval(text, {"a": a, "b": b, "c": c + 1})
    for text in ("a < b and not c == 3", "a != b or b >= c"):
        assert evaluate(parse_expression(text), scope) == bool(eval(text, {"a": a, "b": b, "c": c + 1}))
    assert evaluate(parse_expression("share(c, tensor)"), scope) == 1
    assert evaluate(parse_expression("first(c, tensor) + rank(tensor) * ranks(tensor)"), scope) == c + 2


names = st.text("ab{}.$^[]()*+?0", max_size=6)


@given(st.lists(names, min_size=2, max_size=4), st.data())
def test_a_template_reads_the_names_that_it_writes(literals, data):
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in literals]
    text = escaped[0] + "".join(f"{{c{n}:[x-z]+}}{part}" for n, part in enumerate(escaped[1:]))
    template = parse_template(text)
    captures = {f"c{n}": data.draw(st.text("xyz", min_size=1, max_size=3)) for n in range(len(literals) - 1)}
    name = template.fill(captures)
    assert template.fill(template.match(name) or {}) == name
    assert template.match(name + "!") is None


@st.composite
def rules_and_shards(draw):
    """Draw a rule of several steps, whichever, and shards of a shape that it may or may not fit."""
    ranks, count, ndim = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(2, 3))
    shape = [draw(st.sampled_from([2, 4, 6])) for _ in range(ndim)]
    words, target = ["from: 'w.{n}'"], ["x"]
    if draw(st.booleans()):
        words.append(f"transpose: {draw(st.permutations(range(ndim)))}")
    if draw(st.booleans()):
        words.append(f"unstack: {{dim: {draw(st.integers(0, ndim - 1))}, number: u, count: 2}}")
        target.append("{u}")
    if draw(st.booleans()):
        words.append(f"stack: {{dim: {draw(st.integers(0, 2))}, number: n, count: {count}}}")
    else:
        target.append("{n}")
    use = draw(st.sampled_from(["0", "1", "same", "mean", "{dim: 0, copies: ranks(tensor)}"]))
    words.append(f"axes: {{tensor: {use}}}")
    if draw(st.booleans()):
        words.append(f"pad: {{dim: 0, real: {draw(st.integers(1, 9))}, total: {draw(st.integers(1, 18))}}}")
    name = ".".join(target)
    match draw(st.sampled_from(["plain", "pieces", "series"])):
        case "plain":
            words.append(f"to: '{name}'")
        case "pieces":
            pieces = f"[{{to: 'a.{name}', size: {draw(st.integers(1, 2))}}}, {{to: 'b.{name}'}}]"
            dim, repeat = draw(st.integers(0, 1)), draw(st.integers(1, 2))
            words.append(f"split: {{dim: {dim}, repeat: {repeat}, pieces: {pieces}}}")
        case _:
            words.append(f"split: {{dim: 0, repeat: 2, number: t, pieces: [{{to: '{name}.{{t}}'}}]}}")
    shards = [
        Foreign(f"w.{n}", "float32", tuple(shape), {"tensor": rank})
        for n in range(count)
        for rank in range(ranks)
    ]
    return "rules: 1\nmap:\n  - {" + ", ".join(words) + "}\n", shards, {"tensor": ranks}


@given(rules_and_shards())
def test_the_plan_and_the_account_of_any_rule_tell_the_same(drawn):
    document, shards, axes = drawn
    rules = read_rules(document, "random")
    try:
        plan = plan_import(rules, {}, axes, shards)
    except CheckpointError:
        return  # a rule that does not fit its shards
    check_agreed(rules, {}, axes, plan)
