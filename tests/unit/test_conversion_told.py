"""Numbers of an optimizer that a store tells as plain data, and that readers return as tensors."""

import pytest
import torch

import checkpoint
from checkpoint.errors import Incomplete, Mismatch
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.formats import nesting
from checkpoint.interop.formats.known import open_foreign
from tests.conversion_samples import save_state

ADAFACTOR = {"step": 7, "RMS": 0.3, "exp_avg_sq_row": torch.rand(6), "exp_avg_sq_col": torch.rand(4)}
LBFGS = {"n_iter": 3, "func_evals": 1 << 40, "t": 1.0, "d": torch.rand(24)}


def stored(tmp_path, entries, **more) -> str:
    """Save a model of one parameter, what its optimizer keeps of it, and more."""
    url = str(tmp_path / "store")
    optimizer = {
        "state": {"w": entries},
        "param_groups": [{"params": ["w"], "lr": 0.1, "betas": (0.9, 0.99)}],
    }
    state = {"model": {"w": torch.randn(6, 4)}, "optimizer": optimizer, **more}
    save_state(checkpoint.open_store(url), state)
    return url


def moments(weight=None) -> dict:
    """Return what Adam keeps, without the step, and a master."""
    return {"master": torch.zeros(6, 4) if weight is None else weight, "exp_avg": torch.randn(6, 4)} | {
        "exp_avg_sq": torch.rand(6, 4)
    }


def exported(source: str, tmp_path, format: str) -> dict[str, float]:
    """Export; return the numbers that a reader finds for the optimizer."""
    target = str(tmp_path / "out")
    export_foreign(Whereabouts(source), target, Emigration(format))
    opened = open_foreign(target)
    return {
        one.name: opened.read(number, checkpoint.format.box.Box((), ())).view(one.dtype).item()
        for number, one in enumerate(opened.tensors)
        if one.shape == ()
    }


@pytest.mark.parametrize("format", ["torch", "dcp"])
@pytest.mark.parametrize("entries", [ADAFACTOR, LBFGS], ids=["Adafactor", "LBFGS"])
def test_a_state_that_holds_plain_numbers_is_exported_and_proved(tmp_path, format, entries):
    told = exported(stored(tmp_path, entries), tmp_path, format)
    numbers = {name: value for name, value in entries.items() if not isinstance(value, torch.Tensor)}
    assert told == {f"optimizer.{name}.w": pytest.approx(value) for name, value in numbers.items()}


def test_a_plain_number_that_comes_back_as_another_is_refused(tmp_path, monkeypatch):
    source, put = stored(tmp_path, ADAFACTOR), nesting._named
    monkeypatch.setattr(
        nesting, "_named", lambda state, groups: put({"w": {**state["w"], "step": 8}}, groups)
    )
    with pytest.raises(Mismatch, match=r"optimizer\.step\.w"):
        export_foreign(Whereabouts(source), str(tmp_path / "out"), Emigration("dcp"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed"])
def test_moments_without_steps_go_to_formats_whose_readers_say_one(tmp_path, format):
    weight = torch.randn(6, 4)
    source = stored(tmp_path, moments(weight), model={"w": weight.bfloat16()}, param_shapes=[{"w": [6, 4]}])
    assert exported(source, tmp_path, format).keys() == {"optimizer.step.w"}


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed", "deepspeed-universal"])
def test_a_step_that_is_a_plain_number_is_kept_by_formats_that_have_one_step(tmp_path, format):
    weight = torch.randn(6, 4)
    source = stored(
        tmp_path,
        {**moments(weight), "step": 7},
        model={"w": weight.bfloat16()},
        param_shapes=[{"w": [6, 4]}],
    )
    assert exported(source, tmp_path, format) == {"optimizer.step.w": 7}


def test_universal_folders_have_a_plain_step_as_the_tensor_that_torch_s_adam_counts_in(tmp_path):
    weight = torch.randn(6, 4)
    source = stored(tmp_path, {**moments(weight), "step": 7}, model={"w": weight.bfloat16()})
    exported(source, tmp_path, "deepspeed-universal")
    zero = tmp_path / "out/global_step3_universal/zero"
    found = torch.load(zero / "w/step.pt", weights_only=True)
    assert (found.dtype, found.shape, found.item()) == (torch.float32, (), 7)
    common = torch.load(zero / "optimizer_state.pt", weights_only=True)
    assert torch.equal(common["optimizer_state_dict"]["state"][0]["step"], found)  # where ZeRO-3 looks


def test_a_plain_step_that_some_parameters_lack_is_no_universal_checkpoint(tmp_path):
    url = str(tmp_path / "store")
    state = {"w": {**moments(), "step": 7}, "v": moments()}
    weights = {name: torch.zeros(6, 4) for name in state}
    groups = [{"params": ["w", "v"], "lr": 0.1}]
    save_state(
        checkpoint.open_store(url), {"model": weights, "optimizer": {"state": state, "param_groups": groups}}
    )
    with pytest.raises(Incomplete, match=r"'v' lacks \['step'\]"):
        export_foreign(Whereabouts(url), str(tmp_path / "out"), Emigration("deepspeed-universal"))


def test_the_groups_of_an_optimizer_come_back_from_universal_folders_with_their_parameters(tmp_path):
    url = str(tmp_path / "store")
    state = {name: {**moments(torch.zeros(6, 4)), "step": 7} for name in ("w", "v", "u")}
    groups = [{"params": ["v"], "lr": 0.1}, {"params": ["w", "u"], "lr": 0.2}]
    optimizer = {"state": state, "param_groups": groups}
    save_state(
        checkpoint.open_store(url), {"model": dict.fromkeys(state, torch.zeros(6, 4)), "optimizer": optimizer}
    )
    export_foreign(Whereabouts(url), str(tmp_path / "out"), Emigration("deepspeed-universal"))
    told = open_foreign(str(tmp_path / "out")).about.extra["optimizer"]["param_groups"]
    assert [(one["lr"], one["params"]) for one in told] == [(0.1, ["v"]), (0.2, ["w", "u"])]
