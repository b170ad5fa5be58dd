"""Names that mean two things: refused by name, never mixed up, in either direction."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

import checkpoint
from tests.conversion_samples import save_state
from tests.unit.test_cli_conversions import ask, told

STRANGE = ["other", "optimizer"]


class Net(nn.Module):
    """A model with a child of a name that conversions have a use for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.add_module(name, nn.ModuleDict({"exp_avg": nn.Linear(2, 2)}))


def save_as(form: str, state: dict[str, torch.Tensor], path: Path) -> None:
    match form:
        case "flat":
            torch.save(state, path)
        case "nested":
            torch.save({"model": state, "epoch": 3}, path)
        case "safetensors":
            save_file(state, path)
        case "dcp":
            state_dict_saver.save({"model": state}, checkpoint_id=path, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("form", ["flat", "nested", "safetensors", "dcp"])
def test_a_weight_that_would_be_taken_for_no_weight_is_refused_on_the_way_in(tmp_path, form, name):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    save_as(form, Net(name).state_dict(), path)
    done = ask("import", str(path), str(tmp_path / "store"))
    assert done.exit_code == 1
    assert f"has a weight '{name}.exp_avg." in done.output
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("form", ["hf", "torch", "dcp", "deepspeed-universal"])
def test_and_on_the_way_out_unless_it_is_left_out(tmp_path, form, name):
    store, target = str(tmp_path / "store"), tmp_path / "target"
    save_state(checkpoint.open_store(store), {"model": Net(name).state_dict()}, step=1)
    done = ask("export", store, str(target), "--format", form)
    assert done.exit_code == 2
    assert f"the weight 'model/{name}.exp_avg." in done.output and not target.exists()
    if form != "deepspeed-universal":  # which is of an optimizer's states
        told("export", store, str(target), "--format", form, "--only", "model/body*")
        there = {each["name"] for each in told("inspect", str(target))["tensors"]}
        assert there == {"body.weight", "body.bias"}


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": torch.zeros(3)}, "a.b": torch.ones(3)},
        {"model": {1: torch.zeros(3), "1": torch.ones(3)}},
        {"model": {"a.b": torch.zeros(3), "a": {"b": torch.ones(3)}}, "step": 3},
    ],
)
def test_two_tensors_that_would_have_one_name_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "twice.pt")
    done = ask("import", str(tmp_path / "twice.pt"), str(tmp_path / "store"))
    assert done.exit_code == 1
    assert "two tensors of the name" in done.output and not (tmp_path / "store").exists()


def test_a_copy_makes_no_store_beside_other_files(tmp_path):
    store = checkpoint.open_store(str(tmp_path / "store"))
    save_state(store, {"model": nn.Linear(2, 2).state_dict()}, step=1)
    model = tmp_path / "model"
    told("export", str(tmp_path / "store"), str(model), "--format", "hf")
    before = sorted(model.iterdir())
    done = ask("copy", str(tmp_path / "store"), str(model))
    assert done.exit_code == 1
    assert "which are no store's" in done.output and sorted(model.iterdir()) == before


def test_rules_that_are_no_text_are_told_by_name(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    done = ask("import", str(tmp_path / "a.pt"), str(tmp_path / "to"), "--rules", str(tmp_path / "a.pt"))
    assert done.exit_code == 2
    assert "a.pt is no text in UTF-8" in done.output


def test_what_is_refused_leaves_nothing_beside_its_target(tmp_path):
    store = str(tmp_path / "store")
    save_state(checkpoint.open_store(store), {"model": {"w": torch.zeros(3, dtype=torch.complex128)}}, step=1)
    done = ask("export", store, str(tmp_path / "target"), "--format", "hf")
    assert done.exit_code and "complex128" in done.output
    assert [one.name for one in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("state", [{}, {"model": {}, "epoch": 3}])
def test_a_file_without_tensors_is_no_checkpoint_to_import(tmp_path, state):
    torch.save(state, tmp_path / "empty.pt")
    done = ask("import", str(tmp_path / "empty.pt"), str(tmp_path / "store"))
    assert done.exit_code == 1
    assert "holds no tensors" in done.output and not (tmp_path / "store").exists()
