"""The built-in rule sets: shards cut by plain numpy come back bit for bit, and so does what they write."""

import re

import numpy as np
import pytest

from checkpoint.errors import FormatError, Mismatch
from checkpoint.interop.builtin import builtin_names, builtin_rules
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.rules import plan_import
from checkpoint.interop.writing import plan_export
from tests.interop_samples import (
    LLAMA,
    Arrays,
    assemble,
    check_agreed,
    disperse,
    fingerprints,
    foreign,
    llama,
    megatron_llama,
    proved,
    specs_for,
    weights_for,
)

GPT: dict[str, Size] = {
    "layers": 4,
    "heads": 4,
    "head_dim": 3,
    "inner": 8,
    "vocab": 11,
    "padded_vocab": 12,
    "positions": 5,
}
MIXTRAL: dict[str, Size] = {**LLAMA, "experts": 4}

# rule set, sizes, axes; the layouts are those that the frameworks have
MATRIX: list[tuple[str, dict[str, Size], dict[str, int]]] = [
    ("gpt2-hf", GPT, {}),
    ("neox-hf", {**GPT, "positions": 0}, {}),
    ("neox-hf", {**GPT, "positions": 0, "tied": 1}, {}),
    ("gpt-megatron", GPT, {"tensor": 1, "pipeline": 1}),
    ("gpt-megatron", GPT, {"tensor": 2, "pipeline": 2}),
    ("gpt-megatron", {**GPT, "tied": 0, "fused_norms": 0}, {"tensor": 4, "pipeline": 1}),
    ("gpt-megatron", {**GPT, "heads": (3, 1), "hidden": 12, "inner": (5, 3)}, {"tensor": 2}),
    ("llama-hf", LLAMA, {}),
    ("llama-hf", {**LLAMA, "tied": 0, "qkv_bias": 1}, {}),
    ("llama-megatron", LLAMA, {"tensor": 1, "pipeline": 4}),
    ("llama-megatron", LLAMA, {"tensor": 3, "pipeline": 2}),
    ("llama-megatron", {**LLAMA, "kv_heads": (2, 1)}, {"tensor": 2, "pipeline": 1}),
    ("llama-megatron", {**LLAMA, "layers": (1, 3), "qkv_bias": 1}, {"pipeline": 2, "tensor": 3}),
    ("mixtral-hf", MIXTRAL, {}),
    ("mixtral-megatron", MIXTRAL, {"tensor": 1, "pipeline": 2, "expert": 2}),
    ("mixtral-megatron", {**MIXTRAL, "grouped": 1}, {"tensor": 3, "pipeline": 1, "expert": 4}),
]


def declared(name: str, sizes: dict[str, Size]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the global tensors that a rule set declares, with both moments and the step."""
    rules = builtin_rules(name)
    scope = Scope(resolve_sizes(rules, sizes), {}, {})
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in rules.tensors:
        if tensor.when is None or evaluate(tensor.when, scope):
            counts = [range(evaluate(count, scope)) for count in tensor.each.values()]
            for numbers in np.ndindex(*map(len, counts)):
                filled = tensor.names.fill(dict(zip(tensor.each, map(int, numbers), strict=True)))
                shapes[filled] = tuple(evaluate(dim, scope) for dim in tensor.shape)
    for parameter, shape in list(shapes.items()):
        shapes[f"optimizer/exp_avg/{parameter}"] = shapes[f"optimizer/exp_avg_sq/{parameter}"] = shape
        shapes[f"optimizer/step/{parameter}"] = ()
    return shapes


def content(name: str, sizes: dict[str, Size]) -> Arrays:
    """Return random content, with one step for all parameters, as an optimizer has it."""
    tensors = weights_for(declared(name, sizes))
    return {key: np.array(7, np.uint32) if "/step/" in key else bits for key, bits in tensors.items()}


@pytest.mark.parametrize(("name", "sizes", "axes"), MATRIX, ids=str)
def test_what_a_rule_set_writes_it_reads_back_bit_for_bit(name, sizes, axes):
    tensors = content(name, sizes)
    plan = plan_export(builtin_rules(name), sizes, axes, specs_for(tensors))
    written = disperse(plan, tensors)
    back = plan_import(builtin_rules(name), sizes, axes, plan.foreign)
    found = assemble(back, written)
    assert found.keys() == tensors.keys()
    assert all((found[key] == bits).all() for key, bits in tensors.items())
    check_agreed(builtin_rules(name), sizes, axes, back)
    marks = proved(builtin_rules(name), sizes, axes, plan.foreign, written.__getitem__)
    assert marks == fingerprints(tensors)


def test_every_rule_set_is_in_the_matrix():
    assert {name for name, _, _ in MATRIX} == set(builtin_names())


# ------------------------------------------------------------- against shards cut without our arithmetic


@pytest.mark.parametrize("groups", [(3,), (1, 1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("stages", [(4,), (2, 2), (1, 3)])
@pytest.mark.parametrize("tied", [0, 1])
def test_a_llama_in_megatron_files_is_read_as_it_is(groups, stages, tied):
    weights = llama(tied=tied)
    shards = megatron_llama(weights, groups, stages, tied)
    sizes = {**LLAMA, "kv_heads": groups, "layers": stages, "tied": tied}
    axes = {"tensor": len(groups), "pipeline": len(stages)}
    plan = plan_import(builtin_rules("llama-megatron"), sizes, axes, [tensor for tensor, _ in shards])
    arrays = [bits for _, bits in shards]
    found = assemble(plan, arrays)
    assert found.keys() == weights.keys()
    assert all((found[name] == bits).all() for name, bits in weights.items())
    rules = builtin_rules("llama-megatron")
    assert proved(rules, sizes, axes, plan.foreign, arrays.__getitem__) == fingerprints(weights)
    padding = sum(box.numel for _, box in plan.padding)
    assert padding == 10 * (1 + (tied == 0 or len(stages) > 1))  # one word for each copy of the vocabulary


@pytest.mark.parametrize("axes", [{"tensor": 3, "pipeline": 2}, {"tensor": 1, "pipeline": 4}])
def test_a_llama_is_written_as_megatron_cuts_it(axes):
    weights = llama()
    plan = plan_export(builtin_rules("llama-megatron"), LLAMA, axes, specs_for(weights))
    groups, stages = (3 // axes["tensor"],) * axes["tensor"], (4 // axes["pipeline"],) * axes["pipeline"]
    expected = {str(tensor): bits for tensor, bits in megatron_llama(weights, groups, stages)}
    written = {str(tensor): bits for tensor, bits in zip(plan.foreign, disperse(plan, weights), strict=True)}
    assert {name: bits.shape for name, bits in written.items()} == {
        name: bits.shape for name, bits in expected.items()
    }
    for name, bits in written.items():
        real = expected[name].copy()
        if "word_embeddings" in name or "output_layer" in name:
            real[bits.sum(1) == 0] = 0  # the padding: zeros, where the sample has rubbish
            assert (bits.sum(1) == 0).sum() <= 1
        assert (bits == real).all(), name


def test_gpt_2_has_its_weights_input_first_and_q_k_v_side_by_side():
    sizes = {**GPT, "layers": 1}
    weights = weights_for({k: s for k, s in declared("gpt2-hf", sizes).items() if "/" not in k})
    w = {name.removeprefix("layers.0."): bits for name, bits in weights.items()}
    fused = {part: np.concatenate([w[f"attention.{x}.{part}"] for x in "qkv"]) for part in ("weight", "bias")}
    shards = [
        foreign("transformer.wte.weight", w["embedding.weight"]),
        foreign("transformer.wpe.weight", w["positions.weight"]),
        foreign("transformer.h.0.attn.c_attn.weight", fused["weight"].T),
        foreign("transformer.h.0.attn.c_attn.bias", fused["bias"]),
        foreign("transformer.h.0.attn.c_proj.weight", w["attention.out.weight"].T),
        foreign("transformer.h.0.attn.c_proj.bias", w["attention.out.bias"]),
        foreign("transformer.h.0.mlp.c_fc.weight", w["mlp.up.weight"].T),
        foreign("transformer.h.0.mlp.c_fc.bias", w["mlp.up.bias"]),
        foreign("transformer.h.0.mlp.c_proj.weight", w["mlp.down.weight"].T),
        foreign("transformer.h.0.mlp.c_proj.bias", w["mlp.down.bias"]),
        foreign("transformer.h.0.attn.bias", np.ones((1, 1, 5, 5), np.uint32)),
        foreign("lm_head.weight", w["embedding.weight"]),
    ]
    for part in ("weight", "bias"):
        shards += [
            foreign(f"transformer.h.0.ln_1.{part}", w[f"attention_norm.{part}"]),
            foreign(f"transformer.h.0.ln_2.{part}", w[f"mlp_norm.{part}"]),
            foreign(f"transformer.ln_f.{part}", w[f"final_norm.{part}"]),
        ]
    plan = plan_import(builtin_rules("gpt2-hf"), sizes, {}, [tensor for tensor, _ in shards])
    found = assemble(plan, [bits for _, bits in shards])
    assert found.keys() == weights.keys()
    assert all((found[name] == bits).all() for name, bits in weights.items())
    assert plan.dropped == (10,)


def test_from_one_format_into_another_and_back_nothing_changes():
    """Hugging Face -> global -> Megatron (3 x 2) -> global -> Hugging Face."""
    hf, megatron = builtin_rules("llama-hf"), builtin_rules("llama-megatron")
    weights = llama()
    first = plan_export(hf, LLAMA, {}, specs_for(weights))
    files = disperse(first, weights)
    read = assemble(plan_import(hf, LLAMA, {}, first.foreign), files)
    axes = {"tensor": 3, "pipeline": 2}
    second = plan_export(megatron, LLAMA, axes, specs_for(read))
    again = assemble(plan_import(megatron, LLAMA, axes, second.foreign), disperse(second, read))
    back = disperse(plan_export(hf, LLAMA, {}, specs_for(again)), again)
    names = {spec.name for spec in first.tensors}
    assert names == again.keys()
    order = {tensor.name: bits for tensor, bits in zip(first.foreign, files, strict=True)}
    written = plan_export(hf, LLAMA, {}, specs_for(again)).foreign
    assert all((order[tensor.name] == bits).all() for tensor, bits in zip(written, back, strict=True))


def test_a_document_that_is_not_there_is_named():
    with pytest.raises(FormatError, match="no built-in document 'llama'; there are gpt-megatron"):
        builtin_rules("llama")
    with pytest.raises(FormatError, match="no built-in document"):
        builtin_rules("../model-llama")
    with pytest.raises(FormatError, match=r"line 2.*nowhere to find"):
        read_rules("rules: 1\nextends: model-llama\n", "own rules")


def test_a_size_that_does_not_fit_is_told_with_the_shape_that_the_tensor_has():
    with pytest.raises(
        Mismatch,
        match=re.escape("q.weight' has the shape (12, 10); by the sizes given it should be (198, 10)"),
    ):
        plan_export(builtin_rules("llama-megatron"), {**LLAMA, "heads": 99}, {}, specs_for(llama()))
