"""What no reader would take back is never written: names, runs, shapes, each told where it is given."""

import pytest
import torch

import checkpoint
from checkpoint import Adoption, Misuse
from checkpoint.errors import FormatError
from checkpoint.format.manifest import decode_manifest, encode_manifest
from checkpoint.format.texts import MAX_TEXT
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import save_state

WRONG = ["a\ud800", "\udc80b", "x" * MAX_TEXT]


@pytest.mark.parametrize("name", WRONG, ids=["high", "low", "long"])
def test_a_name_that_no_manifest_can_have_is_refused_before_anything_is_written(name, tmp_path):
    state = {"model": {name: torch.ones(2)}}
    store = checkpoint.open_store(str(tmp_path / "store"))
    with pytest.raises(FormatError, match="the name of a tensor"):
        save_state(store, state)
    torch.save(state, tmp_path / "saved.pt")
    for act in (checkpoint.import_foreign, checkpoint.plan_import_foreign):
        with pytest.raises(FormatError, match="the name of a tensor"):
            act(str(tmp_path / "saved.pt"), store, Adoption())
    assert list(store.list("")) == []


@pytest.mark.parametrize("name", ["é" * 4000, "日本", "a\u2028b", "😀", "x" * (MAX_TEXT - len("model/"))])
def test_any_other_name_is_taken_back(name, tmp_path):
    store = checkpoint.open_store(str(tmp_path / "store"))
    save_state(store, {"model": {name: torch.ones(2)}})
    assert checkpoint.load(store).state["model"].keys() == {name}


def test_a_run_s_name_has_bounds_too(tmp_path):
    for run in ("r" * (MAX_TEXT + 1), "r\ud800"):
        with pytest.raises(FormatError, match="a run's name"):
            checkpoint.Checkpointer(str(tmp_path), run=run)
        with pytest.raises(Misuse):
            Adoption(run=run)


def test_a_manifest_that_could_not_be_read_is_not_encoded():
    store = MemoryStore("s")
    save_state(store, {"model": {"w": torch.ones(2)}})
    manifest = checkpoint.Catalog(store).manifest(3)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    (tensor,) = manifest.tensors
    for wrong in (
        {"run": "r" * (MAX_TEXT + 1)},
        {"token": "\ud800"},
        {"data_cursor": {"text": "[" * 4_300_000}},  # as a reader counts them
        {"meta": {"shards": [[1, 2]] * 4_300_000}},
        {"tensors": (type(tensor)("n\ud800", "float32", (2,), 0),)},
        {"tensors": (type(tensor)("n", "float32", (1,) * 33, 0),)},
    ):
        fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__} | wrong
        with pytest.raises(FormatError):
            encode_manifest(type(manifest)(**fields))
