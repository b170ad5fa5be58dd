"""Plain data of a training that another format has no place for: the report tells them, or they go along."""

import math

import pytest
import torch

import checkpoint
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign, import_foreign
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.formats.known import open_foreign
from tests.conversion_samples import save_state
from tests.interop.unpacking import rewrite, unpack

LOOP = {"loop": {"cursor": {"epoch": 2, "sample": 99}}, "lr_scheduler": {"last_epoch": 5, "base_lrs": [0.1]}}
GROUP = {"params": ["w"], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def adam(**more) -> dict:
    entries = {name: torch.rand(6, 4) for name in ("master", "exp_avg", "exp_avg_sq")}
    return {"state": {"w": {**entries, **more}}, "param_groups": [dict(GROUP)]}


def stored(tmp_path, optimizer, meta=None, **more) -> str:
    url = str(tmp_path / "store")
    weight = optimizer["state"]["w"]["master"].bfloat16()
    state = {"model": {"w": weight}, "optimizer": optimizer, **LOOP, **more}
    save_state(checkpoint.open_store(url), state, meta=meta)
    return url


def notes_of(source: str, tmp_path, format: str) -> tuple[str, ...]:
    return export_foreign(Whereabouts(source), str(tmp_path / "out"), Emigration(format)).notes


@pytest.mark.parametrize("format", ["torch", "dcp", "megatron-dist", "deepspeed-universal", "deepspeed"])
def test_scheduler_cursor_and_options_go_along_wherever_there_is_an_optimizer(format, tmp_path):
    source = stored(tmp_path, adam(step=7), param_shapes=[{"w": [6, 4]}])
    assert notes_of(source, tmp_path, format) == ()
    extra = open_foreign(str(tmp_path / "out")).about.extra
    assert {name: extra[name] for name in LOOP} == LOOP


def test_a_format_that_holds_weights_only_is_said_to_leave_out_the_rest(tmp_path):
    notes = notes_of(stored(tmp_path, adam(step=7)), tmp_path, "hf")
    assert notes[-1] == (
        "plain data that the format hf has no place for are left out: optimizer, loop, lr_scheduler, step"
    )


def test_megatron_s_legacy_files_have_the_scheduler_and_say_that_the_optimizer_is_left_out(tmp_path):
    notes = notes_of(stored(tmp_path, adam(step=7)), tmp_path, "megatron")
    assert notes[-1] == "plain data that the format megatron has no place for are left out: optimizer"
    assert open_foreign(str(tmp_path / "out")).about.extra["lr_scheduler"] == LOOP["lr_scheduler"]


@pytest.mark.parametrize("format", ["torch", "dcp", "megatron-dist", "deepspeed-universal", "deepspeed"])
def test_the_cursor_and_the_metrics_of_a_manifest_go_out_and_come_back(format, tmp_path):
    books = {"data_cursor": {"epoch": 2, "at": [7, 9]}, "metrics": {"loss": 0.5, "best": math.inf}}
    source = stored(tmp_path, adam(step=7), books, param_shapes=[{"w": [6, 4]}])
    assert notes_of(source, tmp_path, format) == ()
    again = checkpoint.open_store(str(tmp_path / "again"))
    import_foreign(str(tmp_path / "out"), again, Adoption())
    manifest = checkpoint.Catalog(again).manifest(3)
    assert (manifest.data_cursor, manifest.metrics) == (books["data_cursor"], {"loss": 0.5, "best": math.inf})
    assert not any(name.startswith("holdfast") for name in checkpoint.load(again).state)


def test_a_format_without_a_place_for_a_cursor_and_metrics_is_said_to_leave_them_out(tmp_path):
    source = stored(tmp_path, adam(step=7), {"data_cursor": 5, "metrics": {"loss": 0.5}})
    assert "holdfast_data_cursor, holdfast_metrics" in notes_of(source, tmp_path, "hf")[-1]


@pytest.mark.parametrize(
    "said",
    [
        {"holdfast_data_cursor": b"no JSON"},
        {"holdfast_metrics": {"loss": [1]}},
        {"holdfast_metrics": 3, "holdfast_data_cursor": float("nan")},
    ],
)
def test_what_cannot_be_a_cursor_or_metrics_is_plain_data_like_any_other(said, tmp_path):
    torch.save({"model": {"w": torch.randn(3)}, **said}, tmp_path / "a.pt")
    again = checkpoint.open_store(str(tmp_path / "again"))
    import_foreign(str(tmp_path / "a.pt"), again, Adoption())
    manifest = checkpoint.Catalog(again).manifest(0)
    assert (manifest.data_cursor, manifest.metrics) == (None, {})
    assert said.keys() <= checkpoint.load(again).state.keys()


@pytest.mark.parametrize("format", ["torch", "dcp", "deepspeed-universal"])
def test_who_chooses_the_model_alone_gets_none_of_the_optimizer(format, tmp_path):
    url, out = stored(tmp_path, adam(step=7)), str(tmp_path / "out")
    report = export_foreign(Whereabouts(url), out, Emigration(format, only="model/*"))
    assert report.notes == ()
    opened = open_foreign(out)
    assert not any(one.name.startswith("optimizer.step") for one in opened.tensors)
    assert "optimizer" not in opened.about.extra or format == "deepspeed-universal"


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed-universal", "deepspeed"])
def test_a_number_that_only_this_optimizer_keeps_is_told_by_its_name(format, tmp_path):
    source = stored(tmp_path, adam(step=7, RMS=0.5), param_shapes=[{"w": [6, 4]}])
    (note,) = notes_of(source, tmp_path, format)
    assert note.endswith("left out: optimizer.state.RMS")


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed"])
def test_a_step_that_nothing_tells_is_the_checkpoint_s_own_and_that_is_said(format, tmp_path):
    source = stored(tmp_path, adam(), param_shapes=[{"w": [6, 4]}])
    (note,) = notes_of(source, tmp_path, format)
    assert "no state of the optimizer says its step" in note
    opened = open_foreign(str(tmp_path / "out"))
    number = next(n for n, one in enumerate(opened.tensors) if one.name == "optimizer.step.w")
    one = opened.tensors[number]
    assert opened.read(number, checkpoint.format.box.Box((), ())).view(one.dtype).item() == 3


def test_a_weight_decay_that_megatron_does_not_give_to_norms_is_told(tmp_path):
    url = str(tmp_path / "store")
    weights = {"w": torch.randn(6, 4), "norm": torch.randn(4)}
    state = {
        name: {"step": 7, "master": one, "exp_avg": torch.zeros_like(one), "exp_avg_sq": torch.ones_like(one)}
        for name, one in weights.items()
    }
    groups = [{**GROUP, "params": list(weights)}]
    save_state(
        checkpoint.open_store(url), {"model": weights, "optimizer": {"state": state, "param_groups": groups}}
    )
    (note,) = notes_of(url, tmp_path, "megatron-dist")
    assert note == "biases and norms had a weight decay of 0.1, as all had; Megatron gives them none"


def test_moments_without_known_options_are_no_optimizer_of_megatron_s(tmp_path):
    optimizer = adam()
    optimizer["param_groups"] = [{"params": ["w"], "lr": 0.1}]
    with pytest.raises(checkpoint.CheckpointError, match="options of its groups"):
        notes_of(stored(tmp_path, optimizer), tmp_path, "megatron-dist")


def test_what_a_model_and_an_optimizer_say_beside_tensors_goes_along(tmp_path):
    optimizer = torch.optim.AdamW(torch.nn.Linear(4, 6, bias=False).parameters()).state_dict()
    state = {
        "model": {"weight": torch.randn(6, 4), "seen": 17},
        "optimizer": {**optimizer, "loss_scaler": {"scale": 1024.0}},
    }
    torch.save(state, tmp_path / "a.pt")
    report = export_foreign(Whereabouts(str(tmp_path / "a.pt")), str(tmp_path / "out"), Emigration("torch"))
    assert report.notes == ()
    back = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert (back["model"]["seen"], back["optimizer"]["loss_scaler"]) == (17, {"scale": 1024.0})


def test_a_store_s_plain_data_of_the_model_go_along_or_are_told(tmp_path):
    url = str(tmp_path / "store")
    save_state(checkpoint.open_store(url), {"model": {"w": torch.randn(3), "extra": {"calls": 4}}})
    report = export_foreign(Whereabouts(url), str(tmp_path / "torch"), Emigration("torch"))
    assert report.notes == ()
    back = torch.load(tmp_path / "torch/checkpoint.pt", weights_only=True)
    assert back["model"]["extra"] == {"calls": 4}
    report = export_foreign(Whereabouts(url), str(tmp_path / "hf"), Emigration("hf"))
    assert report.notes[-1].endswith("left out: model, step")


# ---------------------------------------------------------------------------------------- what readers say


def test_tensors_of_deepspeed_s_client_and_states_that_are_none_of_adam_s_are_told(tmp_path):
    folder, _ = unpack("zero1-bf16-2", tmp_path)

    def add(tree) -> None:
        tree["torch_rng"] = torch.arange(9)

    for path in folder.glob("global_step2*/*model_states.pt"):
        rewrite(path, add)
    shape = torch.load(
        folder / "global_step2_universal/zero/up.bias/exp_avg.pt", weights_only=True, mmap=False
    )
    torch.save(shape, folder / "global_step2_universal/zero/up.bias/max_exp_avg_sq.pt")
    notes = open_foreign(str(folder), "deepspeed").about.notes
    assert any("tensors of the client's state are left out: they lie in torch_rng" in one for one in notes)
    notes = open_foreign(str(folder), "deepspeed-universal").about.notes
    assert any("torch_rng" in one for one in notes)
    assert any("none of Adam's are left out: max_exp_avg_sq" in one for one in notes)


def test_what_a_legacy_file_of_megatron_s_holds_beside_adam_s_states_is_told(tmp_path):
    folder, _ = unpack("megatron-llama", tmp_path)

    def add(tree) -> None:
        tree["optimizer"]["grad_scaler"] = {"scale": 8.0}
        tree["rerun_state_machine"] = {"mode": "disabled"}
        for group in tree["optimizer"]["optimizer"]["param_groups"]:
            group["betas"] = (0.9, 0.95)

    for path in folder.glob("iter_0000007/*/model_optim_rng.pt"):
        rewrite(path, add)
    about = open_foreign(str(folder)).about
    assert about.extra["megatron_optimizer"] == [{"lr": 0.1, "wd_mult": 1.0, "betas": (0.9, 0.95)}]
    assert any("of the optimizer, grad_scaler is left out" in one for one in about.notes)
    assert any("rerun_state_machine" in one for one in about.notes)
