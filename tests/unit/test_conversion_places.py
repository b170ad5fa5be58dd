"""Conversions write in places of their own: what was there stays, and what was finished is gone on from."""

import os

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint import Adoption, AlreadyExists, Change, Emigration, Whereabouts
from checkpoint.errors import Corrupt, Mismatch
from tests.conversion_samples import save_state


class Stop(Exception):
    """Ends a conversion as a person would."""


def made(tmp_path, num_tensors: int = 1) -> str:
    url = str(tmp_path / "made")
    weights = {f"layers.{number}.weight": torch.randn(64, 64) for number in range(num_tensors)}
    optimizer = {
        "state": {
            name: {"exp_avg": one + 1, "exp_avg_sq": one + 2, "step": 3} for name, one in weights.items()
        }
    }
    save_state(checkpoint.open_store(url), {"model": weights, "optimizer": optimizer})
    return url


@pytest.mark.parametrize("path", ["packs/precious.bin", "index/a/b", "manifests/notes.txt", "src/main.py"])
def test_a_folder_of_something_else_never_becomes_a_store(path, tmp_path):
    source = checkpoint.open_store(made(tmp_path))
    mine = tmp_path / "project" / path
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    target = checkpoint.open_store(str(tmp_path / "project"))
    for act in (checkpoint.plan_reshard, checkpoint.reshard):
        with pytest.raises(AlreadyExists, match=rf"holds \['{path}'\], which are no store's"):
            act(source, target, Change("shard=2"))
    assert mine.read_text() == "mine"


def test_a_prune_leaves_alone_what_is_none_of_ours(tmp_path):
    url = made(tmp_path)
    for folder in ("packs", "index"):
        mine = tmp_path / "made" / folder / "precious.bin"
        mine.write_text("mine")
        os.utime(mine, (0, 0))
    store = checkpoint.open_store(url)
    report = checkpoint.prune(store, [checkpoint.LatestN(1)], now_s=1e12, grace_s=0.0)
    assert not [one for one in report.removed if "precious" in one.key]
    assert len([*tmp_path.glob("made/*/precious.bin")]) == 2


@pytest.mark.parametrize("format", ["deepspeed-universal", "hf"])
def test_an_export_goes_on_from_the_files_that_were_finished(format, tmp_path):
    source, target = Whereabouts(made(tmp_path, 12)), str(tmp_path / "out")
    plan = Emigration(format)
    calm = checkpoint.export_foreign(source, str(tmp_path / "calm"), plan)
    assert calm.num_resumed_bytes == 0

    def stop(progress):
        if progress.what == "proving":
            raise Stop

    with pytest.raises(Stop):
        checkpoint.export_foreign(source, target, plan, listener=stop)
    again = checkpoint.export_foreign(source, target, plan)
    assert again.num_resumed_bytes > 0.9 * calm.written_bytes
    assert again.written_bytes + again.num_resumed_bytes == calm.written_bytes


def test_an_export_that_finds_its_place_taken_at_the_end_leaves_it_alone(tmp_path):
    source, target = Whereabouts(made(tmp_path)), tmp_path / "out"

    def take(progress):
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("mine")

    with pytest.raises(AlreadyExists, match="nothing is overwritten"):
        checkpoint.export_foreign(source, str(target), Emigration("hf"), listener=take)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    assert (target / "mine").read_text() == "mine"


def test_an_import_that_finds_files_of_another_beside_its_own_commits_nothing(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    target = tmp_path / "out"

    def take(progress):
        target.mkdir(exist_ok=True)
        (target / "model.safetensors").write_text("another's")

    store = checkpoint.open_store(str(target))
    with pytest.raises(AlreadyExists, match=r"model\.safetensors"):
        checkpoint.import_foreign(str(tmp_path / "x.pt"), store, Adoption(), listener=take)
    assert checkpoint.Catalog(store).steps() == []


@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("format", ["hf", "dcp", "torch"])
def test_a_source_that_changes_while_it_is_exported_is_no_checkpoint(format, how, tmp_path):
    source, target = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    names = [f"layers.{number}.weight" for number in range(20)]
    save_file({name: torch.zeros(256, 256) for name in names}, source / "model.safetensors")
    save_file({name: torch.ones(256, 256) for name in names}, tmp_path / "other.safetensors")
    seen: list[checkpoint.Progress] = []

    def change(progress):
        if progress.what == "writing" and progress.num_done_bytes > progress.num_bytes / 3 and not seen:
            seen.append(progress)
            other = tmp_path / "other.safetensors"
            if how == "replaced":
                other.replace(source / "model.safetensors")
            else:
                with open(source / "model.safetensors", "r+b") as file:
                    file.write(other.read_bytes())

    settings = checkpoint.ConversionSettings(budget_bytes=128 << 20, num_threads=1)
    with pytest.raises((Corrupt, Mismatch), match="changed while it was being read"):
        checkpoint.export_foreign(
            Whereabouts(str(source)), str(target), Emigration(format), settings=settings, listener=change
        )
    assert seen and not target.exists()
    calm = checkpoint.export_foreign(Whereabouts(str(source)), str(target), Emigration(format))
    assert calm.proofs
    same = checkpoint.compare_places(Whereabouts(str(source)), Whereabouts(str(target)))
    assert {one.verdict for one in same} == {checkpoint.Verdict.EQUAL}
