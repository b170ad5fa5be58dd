"""Torch distributed checkpoints in one process: read, written for torch, and damaged in every way."""

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.formats import dcp_writing
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.known import open_foreign
from tests.foreign_samples import Given, check_same, contents_of, named, of_every_dtype, rewritten, some_boxes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:ComplexHalf")


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(flat: str = "nested") -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat == "flat")
    weights, states = get_state_dict(*trained(), options=options)
    return {"model": weights, "optim": states, "step": 12, "rng": torch.get_rng_state(), "names": ["a", "b"]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp_save(state_of(), checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


@pytest.mark.parametrize("flat", ["nested", "flat"])
def test_model_optimizer_and_the_rest_are_named(flat, tmp_path):
    dcp_save(state_of(flat), checkpoint_id=tmp_path / "dcp")
    found = open_foreign(str(tmp_path / "dcp"))
    state = state_of()
    check_same(contents_of(found), named(state) | {"other.rng": state["rng"]})
    assert found.about.step == 12 and found.about.extra["names"] == ["a", "b"]
    (group,) = found.about.extra["optimizer"]["param_groups"]
    assert sorted(group["params"]) == sorted(state["model"]) and group["betas"] == (0.9, 0.999)


def test_a_bare_model_and_a_nested_one_are_models(tmp_path):
    model = trained()[0].state_dict()
    dcp_save(dict(model), checkpoint_id=tmp_path / "bare")
    check_same(contents_of(open_foreign(str(tmp_path / "bare"))), model)
    dcp_save({"app": {"model": model, "epoch": 3}}, checkpoint_id=tmp_path / "app")
    found = open_foreign(str(tmp_path / "app"))
    check_same(contents_of(found), model)
    assert found.about.extra["containers"]["model"] == ["app", "model"]


def test_a_model_beside_its_optimizer_without_a_container_is_a_model(tmp_path):
    state = state_of()
    dcp_save({**state["model"], "optimizer": state["optim"]}, checkpoint_id=tmp_path / "dcp")
    check_same(contents_of(open_foreign(str(tmp_path / "dcp"))), named(state))


def test_every_dtype_comes_and_goes_bit_for_bit(tmp_path):
    tensors = of_every_dtype() | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    dcp_save(dict(tensors), checkpoint_id=tmp_path / "dcp")
    source = open_foreign(str(tmp_path / "dcp"))
    check_same(contents_of(source), tensors)
    copy = rewritten(source, "dcp", tmp_path / "out")
    check_same(contents_of(copy), tensors)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp_load(into, checkpoint_id=tmp_path / "out")
    check_same(into, tensors)


@pytest.mark.parametrize("by", ["threads", "safetensors"])
def test_other_ways_that_torch_writes_are_read(by, tmp_path):
    model = trained()[0].state_dict()
    options: dict[str, Any] = {"thread_count": 3, "single_file_per_rank": False}
    if by == "safetensors":
        options = {"serialization_format": SerializationFormat.SAFETENSORS}
    dcp_save(dict(model), storage_writer=FileSystemWriter(tmp_path / "dcp", **options))
    check_same(contents_of(open_foreign(str(tmp_path / "dcp"))), model)


def test_torch_goes_on_from_what_is_written(saved, tmp_path):
    copy = rewritten(open_foreign(str(saved)), "dcp", tmp_path / "out")
    assert copy.about.extra == open_foreign(str(saved)).about.extra
    model, optimizer = trained(seed=5)
    weights, states = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": states, "step": 0, "names": []}
    dcp_load(state, checkpoint_id=tmp_path / "out")
    assert (state["step"], state["names"]) == (12, ["a", "b"])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    weights, states = get_state_dict(model, optimizer)
    check_same(named({"model": weights, "optim": states}), named(state_of()))


def test_large_tensors_are_written_in_chunks_and_many_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp_writing, "_MAX_CHUNK_BYTES", 300)
    monkeypatch.setattr(dcp_writing, "_MAX_FILE_BYTES", 4000)
    tensors = {"a": torch.randn(7, 31), "b": torch.randn(5), "c": torch.randn(3, 9, 4)}
    copy = rewritten(
        Given(tensors, About("given", extra={"containers": {"model": []}})), "dcp", tmp_path / "out"
    )
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 1
    check_same(contents_of(copy), tensors)
    for number, tensor in enumerate(copy.tensors):
        for box in some_boxes(tensor.shape, number):
            part = tensors[tensor.name][box.within(Box.whole(tensor.shape))].contiguous()
            assert copy.read(number, box).tobytes() == part.numpy().tobytes()
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp_load(into, checkpoint_id=tmp_path / "out")
    check_same(into, tensors)


def test_a_writer_holds_no_more_than_its_budget(tmp_path):
    given = Given({"big": torch.randn(1 << 11, 1 << 9)})
    rewritten(given, "dcp", tmp_path / "out", budget_bytes=1 << 20)
    assert given.largest_read_bytes <= 1 << 18


def test_metadata_that_each_rank_wrote_for_itself_are_put_together(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(4)}
    for rank, name in enumerate(tensors):
        dcp_save({name: tensors[name]}, checkpoint_id=tmp_path / f"of{rank}")
        metadata = read_metadata(tmp_path / f"of{rank}")
        for info in metadata.storage_data.values():
            info.relative_path = f"__{rank}_0.distcp"
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
        shutil.copy(tmp_path / f"of{rank}" / "__0_0.distcp", tmp_path / "all" / f"__{rank}_0.distcp")
    check_same(contents_of(open_foreign(str(tmp_path / "all"))), tensors)


def read_metadata(path: Path) -> Metadata:
    found: Metadata = pickle.loads((path / ".metadata").read_bytes())
    return found


def chunked(path: Path) -> Path:
    """Write a tensor in two chunks, each in a file of its own, as two ranks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_writing, "_MAX_CHUNK_BYTES", 64)
        patch.setattr(dcp_writing, "_MAX_FILE_BYTES", 1000)
        rewritten(Given({"w": torch.randn(8, 4)}), "dcp", path)
    return path


def changed(change: Callable[[Metadata], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        metadata = read_metadata(path)
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


def infos(metadata: Metadata) -> Iterator[Any]:
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            yield info


def move_chunk(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata["model.w"]
    tensor.chunks[1] = ChunkStorageMetadata(torch.Size((3, 0)), torch.Size((4, 4)))


def drop_chunk(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata["model.w"]
    tensor.chunks.pop()


def same_place(metadata: Metadata) -> None:
    first, second = infos(metadata)
    second.relative_path, second.offset = first.relative_path, first.offset + 8
    second.length = first.length - 8


def other_path(path: str) -> Callable[[Metadata], None]:
    return lambda metadata: setattr(next(infos(metadata)), "relative_path", path)


def resize(rows: int) -> Callable[[Metadata], None]:
    return lambda found: setattr(found.state_dict_metadata["model.w"], "size", torch.Size((rows, 4)))


def swap_dtype(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata["model.w"]
    tensor.properties.dtype = torch.int32


def other_shape(path: Path) -> None:
    rewritten(Given({"w": torch.randn(2, 8)}), "dcp", path.with_name("other"))
    shutil.copy(path.with_name("other") / "__0_0.distcp", path / "__1_0.distcp")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda path: (path / ".metadata").unlink(), "looks like none|did not finish"),
    "a missing file": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "a file cut short": (
        lambda path: (path / "__1_0.distcp").write_bytes((path / "__1_0.distcp").read_bytes()[:100]),
        "cut short",
    ),
    "a file of other bytes": (
        lambda path: (path / "__1_0.distcp").write_bytes(bytes((path / "__1_0.distcp").stat().st_size)),
        "__1_0.distcp",
    ),
    "a file of another shape": (other_shape, "another rank's|cut short|no sound zip"),
    "a chunk too few": (changed(drop_chunk), "rank's file missing"),
    "chunks that overlap": (changed(move_chunk), "exactly once|does not say"),
    "two items in one place": (changed(same_place), "on top of each other"),
    "a path outside": (changed(other_path("../other/__0_0.distcp")), "missing"),
    "an absolute path": (changed(other_path("/etc/passwd")), "missing"),
    "a path that is no text": (
        changed(lambda metadata: setattr(next(infos(metadata)), "relative_path", 3)),
        "lies at",
    ),
    "a negative offset": (
        changed(lambda metadata: setattr(next(infos(metadata)), "offset", -5)),
        "should be at",
    ),
    "another dtype": (changed(swap_dtype), "another rank's"),
    "a compressed item": (
        changed(lambda metadata: setattr(next(infos(metadata)), "transform_descriptors", ["stream.zstd"])),
        "compressed",
    ),
    "a shape that chunks do not fill": (
        changed(
            lambda metadata: setattr(metadata.state_dict_metadata["model.w"], "size", torch.Size((9, 4)))
        ),
        "exactly once",
    ),
    "a shape that chunks exceed": (
        changed(
            lambda metadata: setattr(metadata.state_dict_metadata["model.w"], "size", torch.Size((7, 4)))
        ),
        "outside",
    ),
    "no places": (changed(lambda metadata: metadata.storage_data.clear()), "does not say"),
    "places that are none": (
        changed(lambda metadata: setattr(metadata, "storage_data", 3)),
        "lacks the field",
    ),
    "keys that are none": (
        changed(lambda metadata: setattr(metadata, "planner_data", {"model.w": (1.5,)})),
        "puts",
    ),
    "keys within each other": (
        changed(lambda metadata: setattr(metadata, "planner_data", {"model.w": ()})),
        "puts",
    ),
    "a plain dict": (
        lambda path: (path / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "lacks the field",
    ),
    "no pickle": (lambda path: (path / ".metadata").write_bytes(b"hello"), "no pickle"),
    "a pickle cut short": (
        lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-20]),
        "cut short",
    ),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_checkpoint_is_a_clear_error(what, tmp_path):
    damage, said = DAMAGE[what]
    path = chunked(tmp_path / "dcp")
    assert len(list(path.glob("*.distcp"))) == 2
    damage(path)
    with pytest.raises((Corrupt, Incomplete, Unsupported), match=said):
        contents_of(open_foreign(str(path)))


def test_files_of_ranks_that_hold_the_same_constant_are_no_copies(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_writing, "_MAX_CHUNK_BYTES", 64)
        patch.setattr(dcp_writing, "_MAX_FILE_BYTES", 1000)
        rewritten(Given({"w": torch.zeros(8, 4)}), "dcp", tmp_path / "dcp")
    check_same(contents_of(open_foreign(str(tmp_path / "dcp"))), {"w": torch.zeros(8, 4)})


def test_a_save_that_did_not_finish_is_said_to_be_one(tmp_path):
    path = chunked(tmp_path / "dcp")
    (path / ".metadata").unlink()
    with pytest.raises(Incomplete, match="did not finish"):
        open_foreign(str(path), "dcp")
