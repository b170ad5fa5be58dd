"""SIGKILL of `holdfast import` and `export`, from outside and when chance says: the same again ends well.

A kill that comes when all is done is no kill in the middle: it is tried again, for fewer bytes written.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from flows.cli import app
from tests.conversion_samples import adam_state, bits_of, save_state

pytestmark = pytest.mark.soak

REPOSITORY = Path(__file__).parents[2]
FORMATS = ("hf", "dcp", "deepspeed-universal")
HOWS = ("import", *FORMATS)
SLOWLY = ("--memory-budget", "128MiB", "--threads", "1")
NUM_TRIES = 6
THIRDS = (0, 1 / 3, 2 / 3)
_CHANCE = random.Random(7)
# Of the bytes that an undisturbed command leaves behind: somewhere in each third.
MOMENTS = [(how, round(_CHANCE.uniform(third + 0.02, third + 0.33), 2)) for how in HOWS for third in THIRDS]


def words(how: str, places: Path, target: Path) -> list[str]:
    """Return a command: an import from torch.save, or an export to a format."""
    if how == "import":
        return ["import", str(places / "torch"), str(target), *SLOWLY]
    return ["export", str(places / "store"), str(target), "--format", how, *SLOWLY]


def finish(command: list[str]) -> None:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output


def contents(folder: Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path.relative_to(folder)): data for path, data in found.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store of 72 MiB, the same by torch.save, and what undisturbed commands make."""
    folder = Path(tmp_path_factory.mktemp("undisturbed"))
    torch.manual_seed(2)
    weights = {f"h.{number}.weight": torch.randn(1024, 1024) for number in range(6)}
    save_state(checkpoint.open_store(str(folder / "store")), adam_state(weights))
    source, emigration = checkpoint.Whereabouts(str(folder / "store")), checkpoint.Emigration("torch")
    checkpoint.export_foreign(source, str(folder / "torch"), emigration)
    for how in HOWS:
        finish(words(how, folder, folder / f"calm-{how}"))
    return folder


def num_bytes_in(folder: Path) -> int:
    """Count what is written so far, whole or not; a file may get its name just now."""
    return sum(_sizes(str(folder)))


def _sizes(folder: str) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(f"{parent}/{name}").st_size
            except FileNotFoundError:
                continue


def kill_at(command: list[str], folder: Path, num_bytes: int) -> int:
    """Kill a command's process as soon as so many bytes lie in a folder; return how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows import cli; cli.main()", *command],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and num_bytes_in(folder) < num_bytes:
        time.sleep(0.001)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors[-2000:]
    return process.returncode


def is_whole(calm: Path, target: Path) -> bool:
    """Whether a target is what an undisturbed command made; if not, see that it is refused by name."""
    done = CliRunner().invoke(app, ["diff", str(calm), str(target), "--json"])
    if done.exit_code == 0:
        return True
    told = json.loads(done.stdout or "{}")
    assert done.exit_code == 1 and told.keys() == {"error", "kind", "exit_code"}, done.output
    return False


def killed_in_the_middle(how: str, share: float, places: Path, folder: Path) -> Path:
    """Kill a command once it wrote a share of its bytes, or less of them; return its target."""
    calm = places / f"calm-{how}"
    for number in range(NUM_TRIES):
        target = folder / f"try-{number}" / "out"
        target.parent.mkdir()
        goal = int(share * num_bytes_in(calm) / 2**number)
        ended = kill_at(words(how, places, target), target.parent, goal)
        if not is_whole(calm, target):
            assert ended == -signal.SIGKILL and num_bytes_in(target.parent) > 0
            return target
    pytest.fail(f"none of {NUM_TRIES} kills came before the end")


@pytest.mark.parametrize(("how", "share"), MOMENTS)
def test_a_killed_command_is_given_again(how: str, share: float, places: Path, tmp_path: Path):
    target = killed_in_the_middle(how, share, places, tmp_path)
    shown = CliRunner().invoke(app, ["inspect", str(target), "--json"])
    assert shown.exit_code == 1 or json.loads(shown.stdout)["checkpoints"] == [], shown.output
    finish(words(how, places, target))
    assert is_whole(places / f"calm-{how}", target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    if how == "import":
        check_store(target, places / "store")
    else:
        assert contents(target) == contents(places / f"calm-{how}")


def check_store(target: Path, source: Path) -> None:
    """See that a store has the bits of another, and no pack that nobody asks for."""
    store = checkpoint.open_store(str(target))
    assert bits_of(store) == bits_of(checkpoint.open_store(str(source)))
    packs = {pack.key for pack in checkpoint.Catalog(store).manifest(3).packs}
    assert {entry.key for entry in store.list("packs/")} == packs
