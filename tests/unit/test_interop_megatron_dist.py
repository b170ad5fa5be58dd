"""Distributed checkpoints that Megatron-Core itself saved, by its own optimizers, and what is written for it.

Golden tensors are those that the script gave the model and its optimizer before Megatron saved them.
"""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint.errors import CheckpointError, Corrupt, Incomplete, Mismatch, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, compare_places, export_foreign, import_foreign
from checkpoint.interop.conversion.importing import Adoption
from checkpoint.interop.conversion.ruled import choose_rules
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.formats.known import detect, open_foreign
from checkpoint.interop.formats.rounding import round_bits
from checkpoint.interop.moves import Plan
from checkpoint.interop.place import Place
from checkpoint.interop.rules import plan_import
from tests.foreign_samples import Given, check_same, contents_of, rewritten
from tests.interop.megatron_expected import RULES, expected
from tests.interop.unpacking import unpack
from tests.interop_samples import assemble, check_equal, proved

PYTHON = Path(__file__).resolve().parents[2] / ".venv-deepspeed/bin/python"
STATES = ("exp_avg", "exp_avg_sq", "master")


def plan_of(kind: str, opened: ForeignCheckpoint) -> Plan:
    rules = builtin_rules(RULES[kind])
    sizes = {name: size for name, size in opened.about.sizes.items() if name in rules.sizes}
    return plan_import(rules, sizes, opened.about.axes, opened.tensors)


def marks_of(kind: str, opened: ForeignCheckpoint) -> dict[str, int]:
    rules = builtin_rules(RULES[kind])
    sizes = {name: size for name, size in opened.about.sizes.items() if name in rules.sizes}
    return proved(rules, sizes, opened.about.axes, opened.tensors, reading(opened))


def reading(opened: ForeignCheckpoint) -> Callable[[int], np.ndarray]:
    return lambda number: opened.read(number, Box.whole(opened.tensors[number].shape))


def made(kind: str, to: Path) -> Path:
    return unpack(f"megatron-dist-{kind}", to)[0] / "iter_0000007"


@pytest.mark.parametrize(
    "fixture",
    [*RULES, "dp-llama", "dp-gpt", "dp-moe", "virtual-llama", "dp-virtual-gpt"],  # dp: in buckets
)
def test_weights_masters_moments_and_step_are_what_megatron_was_given(fixture, tmp_path):
    folder, golden = unpack(f"megatron-dist-{fixture}", tmp_path)
    kind = fixture.split("-")[-1]
    assert detect(Place(str(folder))).name == "megatron-dist"
    opened = open_foreign(str(folder))
    assert (opened.about.step, opened.about.axes) == (7, {})
    plan = plan_of(kind, opened)
    read = reading(opened)
    found = assemble(plan, [read(number) for number in range(len(plan.foreign))])
    weights = expected(kind, golden, "master:")
    states = {
        f"optimizer/{state}/{name}": bits.view(np.uint32)
        for state in STATES
        for name, bits in expected(kind, golden, f"{state}:").items()
    }
    steps = {f"optimizer/step/{name}" for name in weights}
    assert found.keys() == weights.keys() | states.keys() | steps
    for name, bits in weights.items():
        assert (found[name] == round_bits(bits.view(np.uint32), "bfloat16")).all(), name
    for name, bits in states.items():
        assert (found[name] == bits).all(), name
    assert {float(found[name].view(np.float32)[()]) for name in steps} == {7.0}


@pytest.mark.parametrize("kind", RULES)
def test_what_is_written_comes_back_bit_by_bit(kind, tmp_path):
    opened = open_foreign(str(made(kind, tmp_path)))
    back = rewritten(opened, "megatron-dist", tmp_path / "back")
    check_same(contents_of(back), contents_of(opened))
    assert (back.about.sizes, back.about.step) == (opened.about.sizes, 7)
    assert back.about.extra["megatron_optimizer"] == opened.about.extra["megatron_optimizer"]
    same = marks_of(kind, opened)
    check_equal(same, marks_of(kind, back))


def through_a_store(kind: str, tmp_path: Path) -> Path:
    """Import a checkpoint of Megatron's by rules, and export it to Megatron again."""
    choice = choose_rules(RULES[kind])
    folder = made(kind, tmp_path / "made")
    sizes = open_foreign(str(folder)).about.sizes
    choice = type(choice)(
        choice.rules, {name: size for name, size in sizes.items() if name in choice.rules.sizes}
    )
    store = checkpoint.open_store(str(tmp_path / "store"))
    report = import_foreign(str(folder), store, Adoption(rules=choice))
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    emigration = Emigration("megatron-dist", rules=choice)
    export_foreign(Whereabouts(str(tmp_path / "store")), str(tmp_path / "out"), emigration)
    same = compare_places(
        Whereabouts(str(folder), rules=choice), Whereabouts(str(tmp_path / "out"), rules=choice)
    )
    assert {one.verdict.value for one in same} == {"equal"}
    return tmp_path / "out/iter_0000007"


def test_a_training_goes_from_megatron_through_a_store_and_back(tmp_path):
    folder = through_a_store("llama", tmp_path)
    assert json.loads((folder / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_a_legacy_checkpoint_and_a_distributed_one_of_the_same_training_differ_in_nothing(tmp_path):
    legacy, _ = unpack("megatron-buffers-llama", tmp_path / "legacy")
    choice = choose_rules("llama-megatron")
    same = compare_places(
        Whereabouts(str(legacy), rules=choice),
        Whereabouts(str(made("llama", tmp_path / "dist")), rules=choice),
    )
    assert {one.verdict.value for one in same} == {"equal"}
    assert len(same) == 195


def test_a_legacy_checkpoint_with_virtual_stages_goes_straight_into_a_distributed_one(tmp_path):
    """The optimizer with it: its groups' options, which its file says, go along."""
    legacy, _ = unpack("megatron-virtual-gpt", tmp_path / "legacy")
    choice = choose_rules("gpt-megatron")
    source = Whereabouts(str(legacy), rules=choice)
    report = export_foreign(source, str(tmp_path / "out"), Emigration("megatron-dist", rules=choice))
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    same = compare_places(source, Whereabouts(str(tmp_path / "out"), rules=choice))
    assert {one.verdict.value for one in same} == {"equal"}
    about = open_foreign(str(tmp_path / "out")).about
    assert about.extra["megatron_optimizer"][0]["lr"] == 0.1
    assert about.extra["opt_param_scheduler"] == {"max_lr": 0.1, "num_steps": 70}


def test_buckets_of_several_optimizers_are_left_out_and_that_is_said(tmp_path):
    folder = made("dp-llama", tmp_path)

    def chain(tree: Any) -> None:
        tree.state_dict_metadata = {
            key.replace("optimizer.distributed", "chained_2.optimizer.distributed"): one
            for key, one in tree.state_dict_metadata.items()
        }
        tree.storage_data = {
            type(index)(
                index.fqn.replace("optimizer.distributed", "chained_2.optimizer.distributed"),
                index.offset,
                index.index,
            ): info
            for index, info in tree.storage_data.items()
        }

    rewrite_metadata(folder, chain)
    opened = open_foreign(str(folder))
    assert not any(tensor.name.startswith("optimizer.") for tensor in opened.tensors)
    told = [note for note in opened.about.notes if "--dist-ckpt-optim-fully-reshardable" in note]
    assert len(told) == 1 and "states of chained_2.optimizer.distributed are left out" in told[0]
    assert len(plan_of("llama", opened).tensors) == 39


def test_buckets_of_ranks_that_the_arguments_do_not_speak_of_are_left_out(tmp_path):
    folder = made("dp-llama", tmp_path)
    common = torch.load(folder / "common.pt", weights_only=False)
    common["args"].pipeline_model_parallel_size = 2
    torch.save(common, folder / "common.pt")
    notes = open_foreign(str(folder)).about.notes
    assert any(
        "left out, as of its buckets there are buckets of the model ranks [0, 1]" in one for one in notes
    )


def test_buckets_that_change_places_are_caught(tmp_path):
    """Each rank's are as long as the other's, and hold parameters of the same shapes."""
    folder = made("dp-llama", tmp_path)

    def swap(tree: Any) -> None:
        def other(name: str) -> str:
            names = {"idx_0.gbuf": "idx_1.gbuf", "idx_1.gbuf": "idx_0.gbuf"}
            return next((name.replace(*each) for each in names.items() if each[0] in name), name)

        tree.storage_data = {
            type(index)(other(index.fqn), index.offset, index.index): info
            for index, info in tree.storage_data.items()
        }

    rewrite_metadata(folder, swap)
    refuses(folder, Corrupt, "bucket 0 of the model rank 0 does not hold at 0 what output_layer.weight was")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs Megatron-Core: see tests/interop/deepspeed.txt")
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", "--pipeline 2 --data 1"),
        ("llama", "--pipeline 2 --virtual 2"),
        ("moe", "--expert 2 --data 2"),
        ("gpt", "--tensor 2"),
    ],
)
def test_megatron_loads_what_is_written_into_other_ranks(kind, layout, tmp_path):
    folder = through_a_store(kind, tmp_path)
    command = [str(PYTHON), "-m", "tests.interop.megatron_dist_load", str(folder), "--kind", kind]
    done = subprocess.run(
        [*command, *layout.split()],
        cwd=PYTHON.parents[2],
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------- missing, doubled, stale, and other bugs


def look_through(folder: Path) -> None:
    opened = open_foreign(str(folder), "megatron-dist")
    plan_of("llama", opened)
    contents_of(opened)


def refuses(folder: Path, error: type[CheckpointError], match: str) -> None:
    with pytest.raises(error, match=match):
        look_through(folder)


def rewrite_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / ".metadata"
    tree = pickle.loads(path.read_bytes())
    change(tree)
    path.write_bytes(pickle.dumps(tree))


def test_masters_under_another_weight_s_name_are_caught(tmp_path):
    """Keys of equal shape change places in the metadata, as in Megatron's issue 761: shapes agree."""
    folder = made("llama", tmp_path)

    def swap(tree: Any) -> None:
        qkv, fc1 = (
            "optimizer.state.param.decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            "optimizer.state.param.decoder.layers.mlp.linear_fc1.layer_norm_weight",
        )
        places = {
            type(index)({qkv: fc1, fc1: qkv}.get(index.fqn, index.fqn), index.offset, index.index): info
            for index, info in tree.storage_data.items()
        }
        tree.storage_data = places

    rewrite_metadata(folder, swap)
    refuses(
        folder, Corrupt, "is not what .* was rounded from: the optimizer's states lie under others' names"
    )


def test_layers_that_change_places_are_caught_by_the_fingerprints(tmp_path):
    folder = made("llama", tmp_path)
    opened = open_foreign(str(folder))
    sound = marks_of("llama", opened)

    def swap(tree: Any) -> None:
        def other(index: Any) -> Any:
            offset = index.offset
            if index.fqn.endswith("decoder.layers.mlp.linear_fc2.weight"):
                offset = type(offset)((offset[0] ^ 1, *offset[1:]))
            return type(index)(index.fqn, offset, index.index)

        tree.storage_data = {other(index): info for index, info in tree.storage_data.items()}

    rewrite_metadata(folder, swap)
    wrong = open_foreign(str(folder))
    with pytest.raises(Mismatch, match="the content of 16 of 195 tensors differs"):
        check_equal(sound, marks_of("llama", wrong))


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        ("common.pt", "has no common.pt: the save did not finish"),
        ("metadata.json", "has no metadata.json: the save did not finish"),
        ("__1_0.distcp", "__1_0.distcp is missing"),
    ],
)
def test_a_file_that_is_missing_is_named(gone, match, tmp_path):
    folder = made("llama", tmp_path)
    (folder / gone).unlink()
    refuses(folder, Incomplete, match)


def test_a_save_that_did_not_finish_is_taken_for_no_other_format(tmp_path):
    folder = made("llama", tmp_path)
    (folder / "metadata.json").unlink()
    with pytest.raises(Incomplete, match=r"has no metadata\.json: the save did not finish"):
        open_foreign(str(folder.parent))


def test_a_layer_that_is_missing_is_named(tmp_path):
    folder = made("llama", tmp_path)
    refused = "decoder.layers.3.mlp.linear_fc2.weight"

    def forget(tree: Any) -> None:
        one = tree.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
        one.chunks = [chunk for chunk in one.chunks if chunk.offsets[0] != 3]

    rewrite_metadata(folder, forget)
    refuses(folder, Incomplete, refused)


@pytest.mark.parametrize("size", [[1 << 40, 8], [1 << 20, 1 << 20, 8], [1 << 59, 0], [3, 8], [4]])
def test_metadata_that_count_layers_beyond_reason_are_refused_at_once(size, tmp_path):
    folder = made("llama", tmp_path)

    def stretch(tree: Any) -> None:
        for key, one in tree.state_dict_metadata.items():
            if "layer_norm_weight" in key:
                one.size = torch.Size(size)

    rewrite_metadata(folder, stretch)
    refuses(folder, CheckpointError, "no model has so many layers|outside of its shape|cannot have the shape")


def test_a_rank_s_file_in_the_place_of_another_s_is_caught(tmp_path):
    folder = made("llama", tmp_path)
    shutil.copy(folder / "__0_0.distcp", folder / "__0_1.distcp")
    refuses(folder, CheckpointError, "__0_[01].distcp")


def test_groups_at_different_steps_are_caught(tmp_path):
    folder = made("llama", tmp_path)
    common = torch.load(folder / "common.pt", weights_only=False)
    common["optimizer"]["optimizer"]["param_groups"][1]["step"] = 8.0
    torch.save(common, folder / "common.pt")
    refuses(folder, Corrupt, "groups of parameters at different steps")


def test_code_in_the_common_file_is_refused_and_not_executed(tmp_path):
    folder = made("llama", tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"args": Evil()}, folder / "common.pt")
    with pytest.raises(CheckpointError):
        open_foreign(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"sharded_backend": "zarr"}', "[" * 10_000])
def test_another_backend_and_no_json_at_all_are_refused(text, tmp_path):
    folder = made("llama", tmp_path)
    (folder / "metadata.json").write_text(text)
    with pytest.raises((Corrupt, Unsupported), match=r"no JSON|backend"):
        open_foreign(str(folder))


def test_layers_of_different_kinds_are_numbered(tmp_path):
    opened = open_foreign(str(made("llama", tmp_path)))
    tensors = {
        name: tensor
        for name, tensor in contents_of(opened).items()
        if not name.startswith("optimizer.") and name != "decoder.layers.2.mlp.linear_fc1.weight"
    }
    back = rewritten(Given(tensors, opened.about), "megatron-dist", tmp_path / "back")
    check_same(contents_of(back), tensors)
