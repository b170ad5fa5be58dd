"""Paths of foreign checkpoints are taken as they are, and places that cannot be are told apart."""

import errno
import os
import zipfile

import pytest
import torch

import checkpoint
from checkpoint import Adoption, Emigration, Misuse, StoreRefused, Whereabouts
from checkpoint.interop.place import filesystem, told
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import save_state


@pytest.mark.parametrize("name", ["run::v2", "zip::x", "a:b", "local:c", "s3:", "%41"])
def test_a_path_is_never_taken_for_a_chain_of_clients(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    torch.save({"model": {"w": torch.ones(2)}}, folder / "here.pt")
    (tmp_path / name.partition("::")[0]).mkdir(exist_ok=True)
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / name.partition("::")[0] / "other.pt")
    escaped = str(folder).replace("%", "%25")
    for url in (f"{name}/here.pt", f"{folder}/here.pt", f"file://{escaped}/here.pt"):
        (tensor,) = checkpoint.look_at_foreign(url).tensors
        assert tensor.shape == (2,)
    save_state(checkpoint.open_store(str(tmp_path / "store")), {"model": {"w": torch.ones(2)}})
    source = Whereabouts(str(tmp_path / "store"))
    checkpoint.export_foreign(source, f"{name}/out", Emigration("hf"))
    assert (folder / "out" / "model.safetensors").is_file()


def test_a_chain_of_clients_may_end_in_a_path(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "here.pt")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "here.pt", "in/here.pt")
    (tensor,) = checkpoint.look_at_foreign(f"zip://in/here.pt::{tmp_path}/all.zip").tensors
    assert tensor.shape == (2,)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://x", "knows no 'nope'"),
        ("FILE:///x", "knows no 'FILE'"),
        ("s3://", "bucket or container"),
        ("simplecache::s3://", "bucket or container"),
    ],
)
def test_a_url_that_leads_nowhere_says_why(url, message):
    with pytest.raises(StoreRefused, match=message):
        filesystem(url)


def test_nothing_is_written_among_a_store_s_objects(tmp_path):
    url = str(tmp_path / "store")
    save_state(checkpoint.open_store(url), {"model": {"w": torch.ones(2)}})
    for act in (checkpoint.export_foreign, checkpoint.plan_export_foreign):
        with pytest.raises(StoreRefused, match="lies within the store"):
            act(Whereabouts(url), f"{url}/packs/out", Emigration("hf"))


@pytest.mark.parametrize("step", [-1, 10**12, 10**20])
def test_a_step_that_no_store_can_have_is_refused_beforehand(step, tmp_path):
    with pytest.raises(Misuse, match="step cannot be"):
        Adoption(step=step)
    torch.save({"model": {"w": torch.ones(2)}, "step": abs(step)}, tmp_path / "x.pt")
    for act in (checkpoint.import_foreign, checkpoint.plan_import_foreign):
        store = MemoryStore("s")
        if step > 0:
            with pytest.raises(Misuse, match=f"of step {step}.*give a step"):
                act(str(tmp_path / "x.pt"), store, Adoption())
            assert not list(store.list(""))


def test_a_full_disk_is_told_as_one():
    with pytest.raises(StoreRefused, match=r"^x in /y: No space left on device; make space"), told("x in /y"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
