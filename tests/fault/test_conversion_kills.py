"""SIGKILL at any stage of an import or export: nothing half-written is believed, the same again ends well."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint.errors import CheckpointError
from checkpoint.interop.place import Place
from tests.conversion_samples import adam_state, bits_of, save_state

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
MOMENTS = (0.0, 0.4, 0.8, "proving")
# Converts in a process of its own, and dies at a stage or a share of the bytes.
SCRIPT = """
import os, signal, sys
import checkpoint

how, source, target, moment = sys.argv[1:]

def listener(progress):
    share = progress.num_done_bytes / max(1, progress.num_bytes)
    if progress.what == moment or (moment != "proving" and share > float(moment)):
        os.kill(os.getpid(), signal.SIGKILL)

settings = checkpoint.ConversionSettings(128 << 20, 1)
if how == "import":
    store = checkpoint.open_store(target)
    adoption = checkpoint.Adoption()
    checkpoint.import_foreign(source, store, adoption, settings=settings, listener=listener)
else:
    emigration = checkpoint.Emigration(how)
    place = checkpoint.Whereabouts(source)
    checkpoint.export_foreign(place, target, emigration, settings=settings, listener=listener)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """Return a folder that has a store of 48 MiB, and the same as torch and as dcp."""
    folder = Path(tmp_path_factory.mktemp("whole"))
    torch.manual_seed(2)
    weights = {f"h.{number}.weight": torch.randn(1024, 1024) for number in range(4)}
    save_state(checkpoint.open_store(str(folder / "store")), adam_state(weights))
    source = checkpoint.Whereabouts(str(folder / "store"))
    for format in ("torch", "dcp"):
        checkpoint.export_foreign(source, str(folder / format), checkpoint.Emigration(format))
    return folder


def killed(how: str, source: Path, target: Path, moment: float | str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(source), str(target), str(moment)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("source", ["torch", "dcp"])
def test_an_import(source, moment, places, tmp_path):
    killed("import", places / source, tmp_path / "target", moment)
    target = checkpoint.open_store(str(tmp_path / "target"))
    assert not checkpoint.Catalog(target).steps()
    report = checkpoint.import_foreign(str(places / source), target, checkpoint.Adoption())
    assert report.num_resumed_bytes > 0 or moment in (0.0, 0.4)
    assert bits_of(target) == bits_of(checkpoint.open_store(str(places / "store")))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("source", "format"),
    [("store", "hf"), ("store", "dcp"), ("store", "deepspeed-universal"), ("dcp", "torch")],
)
def test_an_export(source, format, moment, places, tmp_path):
    target = tmp_path / "exports/out"
    killed(format, places / source, target, moment)
    with pytest.raises(CheckpointError):
        _ = Place(str(target)).files
    place, emigration = checkpoint.Whereabouts(str(places / source)), checkpoint.Emigration(format)
    checkpoint.export_foreign(place, str(target), emigration)
    checkpoint.export_foreign(place, str(tmp_path / "calm"), emigration)
    assert contents(target) == contents(tmp_path / "calm")
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def contents(folder: Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path.relative_to(folder)): data for path, data in found.items()}
