"""Checkpoints of ZeRO whose model tensor-parallel ranks divide, each with files of a ZeRO world of its own.

Made by DeepSpeed; the golden tensors are the whole ones, put together by the job itself.
"""

from pathlib import Path

import numpy as np
import pytest

from checkpoint import open_store
from checkpoint.errors import Corrupt, Incomplete, Mismatch
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign, import_foreign
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.conversion.ruled import RuleChoice, choose_rules
from checkpoint.interop.formats.deepspeed import open_deepspeed
from checkpoint.interop.formats.deepspeed_universal import open_deepspeed_universal
from checkpoint.interop.formats.rounding import round_bits, widen_bits
from checkpoint.interop.place import Place
from tests.interop.unpacking import rewrite, unpack, values_of
from tests.unit.test_interop_deepspeed_bugs import change_places
from tests.unit.test_interop_deepspeed_exchanged import nameless

MADE = ["zero1-bf16-2-tensor2", "zero3-bf16-2-tensor2"]
RULES = """
rules: 1
name: divided
axes: {tensor: same}
map:
  - {from: "up.{part:weight|bias}", to: "up.{part}", axes: {tensor: 0}}
  - {from: down.weight, to: down.weight, axes: {tensor: 1}}
  - {from: "{name:embed.weight|norm.weight|norm.bias}", to: "{name}"}
  - {from: head.weight, to: embed.weight, copy: required}
states:
  - {from: "optimizer.{state:master|exp_avg|exp_avg_sq}.{param}", to: "optimizer/{state}/{param}"}
  - {from: "optimizer.step.{param}", to: "optimizer/step/{param}", single: true}
"""
SHAPES = {
    "embed.weight": (11, 6),
    "up.weight": (14, 6),
    "down.weight": (6, 14),
    "up.bias": (14,),
    "norm.weight": (6,),
    "norm.bias": (6,),
}
OPTIM = "bf16_zero_pp_rank_{}_mp_rank_{:02}_optim_states.pt"


def rules(tmp_path: Path) -> RuleChoice:
    document = tmp_path / "divided.yaml"
    document.write_text(RULES)
    return choose_rules(str(document))


def models(folder: Path, rank: int) -> list[Path]:
    return sorted(folder.glob(f"*mp_rank_{rank:02}_model_states.pt"))


@pytest.mark.parametrize("made", MADE)
def test_every_rank_s_parts_are_those_of_the_whole_tensors(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    assert opened.about.axes == {"tensor": 2}
    assert {tensor.at["tensor"] for tensor in opened.tensors} == {0, 1}
    shapes = {(tensor.name, tensor.at["tensor"]): tensor.shape for tensor in opened.tensors}
    assert len(shapes) == len(opened.tensors) == 2 * (5 * len(SHAPES) + 1)
    assert shapes["up.weight", 1] == shapes["optimizer.exp_avg.up.weight", 0] == (7, 6)
    assert shapes["optimizer.master.down.weight", 1] == (6, 7)
    assert len(golden) == 3 * len(SHAPES)


@pytest.mark.parametrize("made", MADE)
def test_rules_put_every_weight_master_and_moment_together(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    source = Whereabouts(str(folder), format="deepspeed", rules=rules(tmp_path))
    export_foreign(source, str(tmp_path / "whole"), Emigration("deepspeed-universal"))
    whole = open_deepspeed_universal(Place(str(tmp_path / "whole")))
    for name, expected in golden.items():
        assert (values_of(whole, name) == expected).all(), name
    for name, shape in SHAPES.items():
        master = golden[f"optimizer.master.{name}"]
        rounded = widen_bits(round_bits(master.view(np.uint32), "bfloat16"), "bfloat16").view(np.float32)
        assert master.shape == shape
        assert (values_of(whole, name) == rounded).all()
        assert values_of(whole, f"optimizer.step.{name}") == 2
    assert whole.about.extra["mp_world_size"] == 1


@pytest.mark.parametrize("made", MADE)
def test_a_stored_import_is_proved_and_comes_back_whole(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    import_foreign(
        str(folder), open_store(stored := f"file://{tmp_path}/stored"), Adoption(rules=rules(tmp_path))
    )
    export_foreign(Whereabouts(stored), str(tmp_path / "whole"), Emigration("deepspeed-universal"))
    whole = open_deepspeed_universal(Place(str(tmp_path / "whole")))
    assert all((values_of(whole, name) == golden[name]).all() for name in golden)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kinds", [("optim",), ("model",), ("optim", "model")])
def test_a_tensor_parallel_rank_whose_files_are_missing_is_named(made, rank, kinds, tmp_path):
    folder, _ = unpack(made, tmp_path)
    for kind in kinds:
        for path in folder.glob(f"global_step2/*mp_rank_{rank:02}_{kind}_states.pt"):
            path.unlink()
    match = (
        rf"of the model-parallel ranks \[{1 - rank}\], and its model was cut among 2"
        if "optim" in kinds
        else f"has no mp_rank_{rank:02}_model_states.pt"
    )
    with pytest.raises(Incomplete, match=match):
        open_deepspeed(Place(str(folder)))


def test_one_file_of_a_tensor_parallel_rank_that_is_missing_is_named(tmp_path):
    folder, _ = unpack("zero1-bf16-2-tensor2", tmp_path)
    (folder / "global_step2" / OPTIM.format(0, 1)).unlink()
    with pytest.raises(Incomplete, match="no optim_states of rank 0, model-parallel rank 1"):
        open_deepspeed(Place(str(folder)))


def test_a_rank_in_between_is_missed_though_no_file_says_how_many_there_are(tmp_path):
    folder, _ = unpack("zero1-bf16-2-tensor2", tmp_path)
    step = folder / "global_step2"
    for path in step.glob("*model_states.pt"):
        rewrite(path, lambda tree: tree.pop("mp_world_size"))
    open_deepspeed(Place(str(folder)))
    for path in step.glob("*mp_rank_01*"):
        path.rename(step / path.name.replace("mp_rank_01", "mp_rank_02"))
    with pytest.raises(Incomplete, match=r"the model-parallel ranks \[0, 2\], and its model was cut among 3"):
        open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("made", MADE)
def test_a_tensor_parallel_rank_s_files_of_another_step_are_caught(made, tmp_path):
    folder, _ = unpack(made, tmp_path)
    for path in models(folder / "global_step2", 1):
        rewrite(path, lambda tree: tree.update(global_steps=3))
    with pytest.raises(Corrupt, match=r"mp_rank_01_model_states.pt is of another step than"):
        open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("kinds", [("optim",), ("model",), ("optim", "model")])
def test_tensor_parallel_ranks_under_each_other_s_names_are_caught(made, kinds, tmp_path):
    folder, _ = unpack(made, tmp_path)
    for kind in kinds:
        for path in folder.glob(f"global_step2/*mp_rank_00_{kind}_states.pt"):
            change_places(path, path.with_name(path.name.replace("mp_rank_00", "mp_rank_01")))
    with pytest.raises(Corrupt, match=r"mp_rank_00_.* was saved as .*mp_rank_01_.*: .* each other's names"):
        open_deepspeed(Place(str(folder)))


def test_optimizers_of_other_tensor_parallel_ranks_are_caught_by_their_weights(tmp_path):
    folder, _ = unpack("zero1-bf16-2-tensor2", tmp_path)
    step = nameless(folder / "global_step2")
    open_deepspeed(Place(str(folder)))
    for rank in range(2):
        change_places(step / OPTIM.format(rank, 0), step / OPTIM.format(rank, 1))
    with pytest.raises(Corrupt, match=r"is not what .* was rounded from"):
        open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("made", MADE)
def test_a_whole_layer_that_differs_between_tensor_parallel_ranks_is_caught(made, tmp_path):
    folder, _ = unpack(made, tmp_path)

    def change(tree) -> None:
        zero = tree["optimizer_state_dict"]
        base = zero.get("base_optimizer_state", zero.get("optimizer_state_dict"))
        base["state"][0]["exp_avg"][0] += 1

    rewrite(folder / "global_step2" / OPTIM.format(0, 1), change)
    source = Whereabouts(str(folder), format="deepspeed", rules=rules(tmp_path))
    with pytest.raises(Mismatch, match=r"exp_avg.embed\.weight"):
        export_foreign(source, str(tmp_path / "whole"), Emigration("deepspeed-universal"))


@pytest.mark.parametrize("stage", [1, 3])
def test_what_was_divided_is_not_written_for_zero_by_a_part_s_shapes(stage, tmp_path):
    folder, _ = unpack("zero1-bf16-2-tensor2", tmp_path)
    source = Whereabouts(str(folder), format="deepspeed", rules=rules(tmp_path))
    with pytest.raises(Exception, match="write deepspeed-universal, which goes by names"):
        export_foreign(source, str(tmp_path / "out"), Emigration("deepspeed", f"replica=2,zero={stage}"))
