"""Hugging Face folders that hold more than one model: refused unless it is clear which is meant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from checkpoint.errors import Incomplete, NotFound, Unsupported
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign, plan_export_foreign
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.formats.known import open_foreign
from tests.foreign_samples import check_same, contents_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INDEX = "model.safetensors.index.json"


def put(folder: Path, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    """Write files of one tensor each, which is called after its file."""
    put_in = {name: {f"in.{number}.{name}": torch.randn(3)} for number, name in enumerate(names)}
    for name, tensors in put_in.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return put_in


def index(folder: Path, given: dict[str, dict[str, torch.Tensor]], *names: str) -> None:
    weight_map = {tensor: f"{name}.safetensors" for name in names for tensor in given[name]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened(folder: Path) -> ForeignCheckpoint:
    return open_foreign(str(folder))


MIXED = {
    "two counts, each number once": (
        "model-00002-of-00003",
        "model-00003-of-00003",
        "model-00001-of-00002",
    ),
    "two prefixes": ("model-00001-of-00002", "old-00002-of-00002"),
    "two endings": ("model-00001-of-00002", "model-00002-of-00002.fp16"),
    "a whole set and a shard of another": (
        "model-00001-of-00003",
        "model-00002-of-00003",
        "model-00003-of-00003",
        "model-00001-of-00002",
    ),
    "two whole sets": ("model-00001-of-00001", "old-00001-of-00001"),
    "a model and its copies": ("model", "ema_model", "optimizer"),
    "a model and an adapter": ("model", "adapter_model"),
    "files without numbers": ("first", "second"),
    "a shard and a whole model": ("model-00001-of-00001", "model"),
    "a part of a rank and a shard": ("shard-00001-model-00001-of-00001", "model-00001-of-00001"),
}


@pytest.mark.parametrize("what", list(MIXED))
def test_files_of_which_it_is_not_clear_that_they_are_one_model_are_refused_by_name(what, tmp_path):
    names = MIXED[what]
    given = put(tmp_path, *names)
    with pytest.raises(Unsupported, match="Give the path of one file, remove the others, or restore") as told:
        opened(tmp_path)
    assert f"{names[0]}.safetensors" in str(told.value) and f"{names[-1]}.safetensors" in str(told.value)
    for name in names:
        check_same(contents_of(opened(tmp_path / f"{name}.safetensors")), given[name])


def test_of_many_files_the_first_few_are_named_and_the_others_counted(tmp_path):
    put(tmp_path, *"abcdefg")
    with pytest.raises(Unsupported, match=r"a\.safetensors, .*, e\.safetensors and 2 more\."):
        opened(tmp_path)


@pytest.mark.parametrize("names", [["only"], ["x-00001-of-00002.fp16", "x-00002-of-00002.fp16"]])
def test_one_file_or_one_whole_set_is_a_model_whatever_its_name(names, tmp_path):
    given = put(tmp_path, *names)
    found = opened(tmp_path)
    check_same(contents_of(found), {key: one for each in given.values() for key, one in each.items()})
    assert found.about.notes == ()


def test_a_shard_in_a_folder_is_incomplete_and_one_that_was_asked_for_is_noted(tmp_path):
    given = put(tmp_path, "model-00002-of-00002")
    with pytest.raises(Incomplete, match=r"1 of 2 shards.*model-00002-of-00002\.safetensors"):
        opened(tmp_path)
    found = opened(tmp_path / "model-00002-of-00002.safetensors")
    check_same(contents_of(found), given["model-00002-of-00002"])
    assert found.about.notes == (
        "model-00002-of-00002.safetensors is one of 2 shards: what the others hold is left out",
    )


def test_parts_of_ranks_that_are_dealt_to_several_files_are_one_model(tmp_path):
    whole = {"a": torch.randn(6, 2), "b": torch.randn(4)}
    for rank in range(2):
        for number, (name, tensor) in enumerate(whole.items(), 1):
            rows = tensor.shape[0] // 2
            offsets = [rank * rows] + [0] * (tensor.ndim - 1)
            told = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": offsets}})}
            path = tmp_path / f"shard-0000{rank + 1}-model-0000{number}-of-00002.safetensors"
            save_file({name: tensor[rank * rows :][:rows].contiguous()}, path, metadata=told)
    check_same(contents_of(opened(tmp_path)), whole)


def test_a_model_beside_an_index_that_does_not_name_it_is_refused(tmp_path):
    given = put(tmp_path, "model", "model-00001-of-00001")
    index(tmp_path, given, "model-00001-of-00001")
    with pytest.raises(Unsupported, match=rf"holds model\.safetensors and {INDEX}.*which one is meant"):
        opened(tmp_path)
    check_same(contents_of(opened(tmp_path / "model.safetensors")), given["model"])
    (tmp_path / "model.safetensors").unlink()
    check_same(contents_of(opened(tmp_path)), given["model-00001-of-00001"])


def test_a_model_that_its_index_names_is_read(tmp_path):
    given = put(tmp_path, "model")
    index(tmp_path, given, "model")
    found = opened(tmp_path)
    check_same(contents_of(found), given["model"])
    assert found.about.notes == ()


def test_files_that_the_index_does_not_name_are_noted(tmp_path):
    given = put(tmp_path, "model-00001-of-00001", "consolidated", "original/model")
    index(tmp_path, given, "model-00001-of-00001")
    found = opened(tmp_path)
    check_same(contents_of(found), given["model-00001-of-00001"])
    assert found.about.notes == (
        "other safetensors files are not looked at: consolidated.safetensors, original/model.safetensors",
    )


def test_what_torch_saved_beside_a_model_is_noted_unless_the_format_was_named(tmp_path):
    given = put(tmp_path, "model")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    found = opened(tmp_path)
    check_same(contents_of(found), given["model"])
    found.settle()
    assert found.about.notes == (
        "it is read as hf, and what looks like torch is not looked at: pytorch_model.bin, training_args.bin "
        "(--format says otherwise)",
    )
    assert open_foreign(str(tmp_path), "hf").about.notes == ()


def test_a_model_beside_a_distributed_checkpoint_is_noted(tmp_path):
    weights = {"a": torch.randn(2)}
    dcp_save(dict(weights), checkpoint_id=tmp_path, no_dist=True)
    assert opened(tmp_path).about.notes == ()
    put(tmp_path, "model")
    found = opened(tmp_path)
    check_same(contents_of(found), weights)
    assert found.about.notes == (
        "it is read as dcp, and what looks like hf is not looked at: model.safetensors "
        "(--format says otherwise)",
    )


def test_a_plan_and_an_export_of_what_is_noted_go_as_ever(tmp_path):
    given = put(tmp_path / "model", "model")
    torch.save({"w": torch.zeros(2)}, tmp_path / "model" / "pytorch_model.bin")
    source, out = Whereabouts(str(tmp_path / "model")), tmp_path / "out"
    assert plan_export_foreign(source, str(out), Emigration("torch")).num_tensors == 1
    report = export_foreign(source, str(out), Emigration("torch"))
    assert any("pytorch_model.bin" in note for note in report.notes)
    check_same(contents_of(opened(out)), given["model"])


@pytest.mark.parametrize(
    "config", [{"torch_dtype": "float32"}, {"text_config": {"dtype": "float32"}, "n": 1}]
)
def test_a_configuration_that_is_written_with_another_type_is_not_called_left_out(config, tmp_path):
    put(tmp_path / "model", "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    source, out = Whereabouts(str(tmp_path / "model")), tmp_path / "out"
    assert export_foreign(source, str(out), Emigration("hf", dtype="bf16")).notes == ()
    assert "bfloat16" in (out / "config.json").read_text()


def test_a_link_that_leads_nowhere_is_called_that(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(NotFound, match=r"model\.safetensors in .* is a link that leads nowhere"):
        opened(tmp_path)
    (tmp_path / "gone").mkdir()
    given = put(tmp_path / "gone", "blob")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone" / "blob.safetensors")
    check_same(contents_of(opened(tmp_path)), given["blob"])
