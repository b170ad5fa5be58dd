"""What cannot be converted is refused before anything is written, in words of what people gave."""

from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint.errors import Incomplete, Misuse, StoreRefused, Unsupported
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import (
    Whereabouts,
    export_foreign,
    import_foreign,
    plan_export_foreign,
    plan_import_foreign,
)
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.conversion.ruled import RuleChoice
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.known import open_foreign
from checkpoint.interop.grammar import read_rules
from tests.conversion_samples import adam_state, save_state
from tests.foreign_samples import check_same, contents_of

HEAD = "rules: 1\nname: mine\n"
KEPT = {
    "SGD": {"momentum_buffer": True},
    "Adagrad": {"sum": True, "step": False},
    "Lion": {"exp_avg": True},
    "AMSGrad": {"exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": True, "step": False},
}


def weights() -> dict[str, torch.Tensor]:
    return {"wte.weight": torch.randn(6, 4), "b": torch.randn(3), "rope.freq": torch.ones(2)}


def file_of(tmp_path, state) -> str:
    path = tmp_path / "x.pt"
    torch.save(state, path)
    return str(path)


def ruled(text: str) -> Adoption:
    return Adoption(rules=RuleChoice(read_rules(HEAD + text, "mine"), {}))


@pytest.mark.parametrize("convert", [import_foreign, plan_import_foreign])
def test_rules_that_leave_nothing_are_refused_like_an_empty_source(tmp_path, convert):
    source, target = file_of(tmp_path, {"model": weights()}), tmp_path / "store"
    with pytest.raises(Misuse, match="rules mine leave out all 3 tensors"):
        convert(source, checkpoint.open_store(str(target)), ruled('map: [{from: "{x:.*}", drop: true}]'))
    assert not target.exists() or not any(target.rglob("*"))


@pytest.mark.parametrize("convert", [import_foreign, plan_import_foreign])
def test_a_report_names_what_rules_drop(tmp_path, convert):
    source = file_of(tmp_path, {"model": weights()})
    rules = 'map:\n- {from: "{x:rope.*|b}", drop: true}\n- {from: wte.weight, to: w}\n'
    report = convert(source, checkpoint.open_store(str(tmp_path / "store")), ruled(rules))
    assert report.num_tensors == 1
    assert report.notes == ("tensors that the rules drop: 2 (b, rope.freq)",)


@pytest.mark.parametrize("convert", [export_foreign, plan_export_foreign])
@pytest.mark.parametrize("format", ["deepspeed", "deepspeed-universal"])
@pytest.mark.parametrize("kind", KEPT)
def test_an_optimizer_that_is_not_adam_goes_to_no_format_of_deepspeed(tmp_path, kind, format, convert):
    model = weights()
    states = {
        name: {
            key: torch.rand_like(weight) if is_wide else torch.tensor(2.0)
            for key, is_wide in KEPT[kind].items()
        }
        for name, weight in model.items()
    }
    optimizer = {"state": states, "param_groups": [{"params": list(model), "lr": 0.1}]}
    source, target = str(tmp_path / "store"), tmp_path / "out"
    save_state(checkpoint.open_store(source), {"model": model, "optimizer": optimizer})
    said = rf"of Adam only \(exp_avg, exp_avg_sq, step\).*has {', '.join(sorted(KEPT[kind]))}: choose another"
    with pytest.raises(Unsupported, match=said):
        convert(Whereabouts(source), str(target), Emigration(format))
    assert [one.name for one in tmp_path.iterdir()] == ["store"]
    convert(Whereabouts(source), str(target), Emigration("deepspeed-universal", only="model/*"))


def test_a_folder_where_none_can_be_made_is_said_in_words_of_the_target():
    said = r"^/proc/nowhere/x cannot be written: no directory can be made in /proc/nowhere$"
    with pytest.raises(StoreRefused, match=said), drafting("/proc/nowhere/x", "a1"):
        pass


@pytest.mark.parametrize("name", ["a\0b", "a/b"])
def test_a_parameter_that_can_name_no_folder_goes_to_no_universal_folder(tmp_path, name):
    source = str(tmp_path / "store")
    save_state(checkpoint.open_store(source), adam_state({name: torch.randn(4, 3)}))
    with pytest.raises(Unsupported, match="is no name that a folder can have") as raised:
        export_foreign(Whereabouts(source), str(tmp_path / "out"), Emigration("deepspeed-universal"))
    assert repr(name) in str(raised.value)


def without_zero(tmp_path, *, is_half: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save what DeepSpeed's engine does at stage 0: as an fp32 optimizer, or one around fp32 copies."""
    dtype = torch.bfloat16 if is_half else torch.float32
    model = {"a.weight": torch.randn(4, 3).to(dtype), "b.weight": torch.randn(5).to(dtype)}
    entries = {
        number: {
            "step": torch.tensor(2.0),
            **{key: torch.rand(one.shape) for key in ("exp_avg", "exp_avg_sq")},
        }
        for number, one in enumerate(model.values())
    }
    inner = {"state": entries, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    copies = [[one.float() for one in model.values()]]
    optimizer = {"cur_iter": 2, "optimizer_state_dict": inner, "fp32_groups": copies} if is_half else inner
    engine: dict[str, Any] = {
        "buffer_names": [],
        "param_shapes": None,
        "lr_scheduler": None,
        "global_steps": 2,
    }
    folder = tmp_path / "ck"
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    torch.save(
        {"module": model, "optimizer": optimizer, **engine},
        folder / "global_step2/mp_rank_00_model_states.pt",
    )
    return folder, model


@pytest.mark.parametrize("format", [None, "deepspeed"])
def test_a_folder_of_deepspeed_without_zero_says_which_file_can_be_read(tmp_path, format):
    folder, _ = without_zero(tmp_path, is_half=False)
    said = r"no \*_optim_states.pt of ZeRO.*stage 0.*path of global_step2/mp_rank_00_model_states.pt"
    with pytest.raises((Unsupported, Incomplete), match=said):
        open_foreign(str(folder), format)


@pytest.mark.parametrize("is_half", [False, True])
def test_that_file_has_the_weights_and_the_optimizer_of_fp32(tmp_path, is_half):
    folder, model = without_zero(tmp_path, is_half=is_half)
    found = contents_of(open_foreign(str(folder / "global_step2/mp_rank_00_model_states.pt")))
    check_same({name: one for name, one in found.items() if name in model}, model)
    assert ("optimizer.exp_avg.a.weight" in found) is not is_half


@pytest.mark.parametrize("other", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt"])
def test_parts_of_a_model_without_zero_are_not_read_one_by_one(tmp_path, other):
    folder, _ = without_zero(tmp_path, is_half=False)
    (folder / "global_step2" / other).write_bytes(b"x")
    with pytest.raises(Unsupported, match="Each file has a part of the model"):
        open_foreign(str(folder))
