"""What is plain data of an optimizer follows its parameters where rules give them other names."""

import pytest
import torch

import checkpoint
from checkpoint.errors import Misuse
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign, import_foreign
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.conversion.ruled import RuleChoice, choose_rules
from checkpoint.interop.formats.known import open_foreign
from checkpoint.interop.grammar import read_rules
from tests.conversion_samples import save_state
from tests.unit.test_conversion_whole import llama_weights

FUSED = """
rules: 1
name: fused
map:
  - {from: wte, to: embedding}
  - {from: "h.{layer}.qk", split: {dim: 0, pieces: [{to: "layers.{layer}.q"}, {to: "layers.{layer}.k"}]}}
states:
  - {from: "optimizer.{state:exp_avg}.{param}", to: "optimizer/{state}/{param}"}
  - {from: "optimizer.{state:step|RMS}.{param}", to: "optimizer/{state}/{param}", single: true}
"""
NAMES = ("embedding", "layers.0.q", "layers.0.k")


def rules() -> RuleChoice:
    return RuleChoice(read_rules(FUSED, "fused"), {})


def stored(tmp_path, rms=0.25, **numbers) -> str:
    """Save a model whose optimizer keeps a step and more as plain numbers; `numbers` are those of k."""
    url = str(tmp_path / "store")
    state = {name: {"exp_avg": torch.randn(4, 3), "step": 7, "RMS": rms, "tag": "a"} for name in NAMES}
    state["layers.0.k"] |= numbers
    groups = [{"params": ["embedding"], "lr": 0.1}, {"params": list(NAMES[1:]), "lr": 0.2}]
    weights = {name: torch.randn(4, 3) for name in NAMES}
    save_state(
        checkpoint.open_store(url), {"model": weights, "optimizer": {"state": state, "param_groups": groups}}
    )
    return url


@pytest.mark.parametrize("format", ["torch", "dcp"])
def test_numbers_and_groups_go_out_under_the_names_of_the_format_and_come_back(format, tmp_path):
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    report = export_foreign(Whereabouts(stored(tmp_path)), out, Emigration(format, rules=rules()))
    assert report.notes == ()
    opened = open_foreign(out)
    assert {one.name for one in opened.tensors} == {
        *("wte", "h.0.qk", "optimizer.exp_avg.wte", "optimizer.exp_avg.h.0.qk", "optimizer.step.wte"),
        *("optimizer.step.h.0.qk", "optimizer.RMS.wte", "optimizer.RMS.h.0.qk"),
    }
    groups = opened.about.extra["optimizer"]["param_groups"]
    assert [(one["lr"], one["params"]) for one in groups] == [(0.1, ["wte"]), (0.2, ["h.0.qk"])]
    import_foreign(out, checkpoint.open_store(again), Adoption(rules=rules()))
    optimizer = checkpoint.load(checkpoint.open_store(again)).state["optimizer"]
    assert [sorted(one["params"]) for one in optimizer["param_groups"]] == [["embedding"], sorted(NAMES[1:])]
    assert {name: entries["tag"] for name, entries in optimizer["state"].items()} == dict.fromkeys(NAMES, "a")
    assert {float(entries["step"]) for entries in optimizer["state"].values()} == {7.0}
    assert {float(entries["RMS"]) for entries in optimizer["state"].values()} == {0.25}


def test_parts_of_one_parameter_that_tell_different_numbers_are_refused(tmp_path):
    source = stored(tmp_path, step=8)
    with pytest.raises(Misuse, match=r"becomes a part of 'h\.0\.qk', and its optimizer's step is"):
        export_foreign(Whereabouts(source), str(tmp_path / "out"), Emigration("torch", rules=rules()))


def test_numbers_that_are_none_agree_with_themselves(tmp_path):
    source, out = stored(tmp_path, rms=float("nan")), str(tmp_path / "out")
    assert export_foreign(Whereabouts(source), out, Emigration("torch", rules=rules())).notes == ()


def test_parts_of_one_parameter_in_groups_of_different_options_are_refused(tmp_path):
    url = str(tmp_path / "store")
    optimizer = {
        "state": {name: {"exp_avg": torch.randn(4, 3)} for name in NAMES},
        "param_groups": [{"params": list(NAMES[:2]), "lr": 0.1}, {"params": [NAMES[2]], "lr": 0.2}],
    }
    weights = {name: torch.randn(4, 3) for name in NAMES}
    save_state(checkpoint.open_store(url), {"model": weights, "optimizer": optimizer})
    with pytest.raises(Misuse, match=r"parts of 'h\.0\.qk' are in groups of the optimizer with different"):
        export_foreign(Whereabouts(url), str(tmp_path / "out"), Emigration("torch", rules=rules()))


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed-universal"])
def test_a_plain_step_goes_with_a_llama_under_megatron_s_names(format, tmp_path):
    weights = llama_weights()
    state = {
        name: {
            "step": 7,
            "master": one,
            "exp_avg": torch.randn_like(one),
            "exp_avg_sq": torch.rand_like(one),
        }
        for name, one in weights.items()
    }
    groups = [{"params": list(weights), "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0}]
    url = str(tmp_path / "store")
    save_state(
        checkpoint.open_store(url), {"model": weights, "optimizer": {"state": state, "param_groups": groups}}
    )
    sizes = ["layers=2", "heads=4", "kv_heads=2", "head_dim=4", "hidden=16", "inner=24", "vocab=50"]
    choice = choose_rules("llama-megatron", [*sizes, "padded_vocab=52"])
    report = export_foreign(Whereabouts(url), str(tmp_path / "out"), Emigration(format, rules=choice))
    assert report.notes == ()
    opened = open_foreign(str(tmp_path / "out"))
    steps = {
        opened.read(number, checkpoint.format.box.Box((), ())).view(one.dtype).item()
        for number, one in enumerate(opened.tensors)
        if one.name.startswith("optimizer.step.")
    }
    owners = {one.name for one in opened.tensors if one.name.startswith("optimizer.exp_avg.")}
    assert steps == {7}
    assert sum(one.name.startswith("optimizer.step.") for one in opened.tensors) == len(owners)
