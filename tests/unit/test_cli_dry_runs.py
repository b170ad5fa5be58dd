"""What `--dry-run` tells comes true."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from checkpoint.errors import AlreadyExists, StoreRefused
from tests.conversion_samples import adam_state, block_weights, save_state
from tests.interop.unpacking import unpack
from tests.unit.test_cli_conversions import told


def check(verb: str, origin: str, target: Path, *options: str) -> None:
    """Rehearse a conversion, do it, and hold the one against the other."""
    arguments = [verb, origin, str(target), *options, "--memory-budget", "256MiB"]
    planned = told(*arguments, "--dry-run")
    assert not target.exists()
    done = told(*arguments)
    assert planned["read_bytes"] == done["read_bytes"] > 0, arguments
    assert planned["peak_bytes"] == done["peak_bytes"] <= 256 << 20, arguments
    if verb == "export":
        size = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
        assert planned["written_bytes"] == done["written_bytes"] == size, arguments
    else:
        assert planned["written_bytes"] >= done["written_bytes"] > 0, arguments


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("made") / "store")
    save_state(checkpoint.open_store(url), adam_state(block_weights()))
    return url


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "dcp"),
        ("--format", "torch"),
        ("--format", "hf"),
        ("--format", "hf", "--dtype", "bf16"),
        ("--format", "megatron", "--only", "model/*"),
        ("--format", "deepspeed-universal"),
    ],
)
def test_a_rehearsed_export_tells_what_is_then_read_and_written_and_the_budget(source, tmp_path, options):
    check("export", source, tmp_path / "out", *options)


@pytest.mark.parametrize(
    "options", [(), ("--to", "shard=3"), ("--dtype", "bf16", "--to", "replica=2,zero=3")]
)
def test_a_planned_resharding_tells_what_is_then_read_and_at_most_written(source, tmp_path, options):
    check("reshard", source, tmp_path / "out", *options)


@pytest.mark.parametrize("spread", ["replica=1,zero=1", "replica=4,zero=2", "replica=13,zero=3"])
def test_an_export_to_many_ranks_of_zero_is_told_with_its_padding(tmp_path, spread):
    ours, _ = unpack("zero2-bf16-3", tmp_path)
    check("export", str(ours), tmp_path / "out", "--format", "deepspeed", "--to", spread)
    stored = str(tmp_path / "stored")
    told("import", str(ours), stored)
    check("export", stored, tmp_path / "again", "--format", "deepspeed", "--to", spread)


def test_what_comes_from_a_foreign_file_is_told_as_well(tmp_path):
    torch.save({"w": torch.randn(600, 500), "b": torch.randn(500)}, tmp_path / "a.pt")
    check("export", str(tmp_path / "a.pt"), tmp_path / "hf", "--format", "hf")
    check("export", str(tmp_path / "a.pt"), tmp_path / "torch", "--format", "torch", "--dtype", "fp16")
    check("import", str(tmp_path / "a.pt"), tmp_path / "store")


GROWTH = """
import json, sys
import numpy, torch  # what a conversion imports is no buffer
from checkpoint import (Change, ConversionSettings, Emigration, Adoption, Whereabouts, export_foreign,
                        import_foreign, open_store, reshard)
verb, dtype, source, target, warm = sys.argv[1:]
dtype = None if dtype == "-" else dtype
settings = ConversionSettings(budget_bytes=512 << 20)
def convert(source, target):
    if verb == "reshard":
        return reshard(open_store(source), open_store(target), Change("shard=3", dtype), settings=settings)
    if verb == "import":
        return import_foreign(source, open_store(target), Adoption(), settings=settings)
    return export_foreign(Whereabouts(source), target, Emigration(verb, dtype=dtype), settings=settings)
convert(warm, target + "-warm")
report = convert(source, target)
print(json.dumps([report.peak_bytes, report.grown_bytes]))
"""


def slowly(*kinds: tuple[str, str]) -> list:
    return [pytest.param(*one, marks=pytest.mark.slow) for one in kinds]


@pytest.mark.parametrize(
    ("verb", "dtype"),
    [
        ("reshard", "-"),
        ("reshard", "bf16"),
        *slowly(
            ("import", "-"), ("hf", "-"), ("dcp", "-"), ("torch", "-"), ("hf", "bf16"), ("torch", "fp64")
        ),
    ],
)
def test_a_process_grows_by_no_more_than_was_told(verb, dtype, tmp_path):
    """What buffers hold is a bound, of which streams need a part; a tenth more is the allocator's."""
    torch.manual_seed(6)
    small, large = tmp_path / "small", tmp_path / "large"
    for place, rows in ((small, 8), (large, 1500)):
        state = {f"h.{n}.w": torch.randn(rows, 1100) for n in range(8)}
        if verb == "import":
            place.mkdir()
            save_file(state, place / "model.safetensors")
        else:
            save_state(checkpoint.open_store(str(place)), {"model": state})
    command = [sys.executable, "-c", GROWTH, verb, dtype, str(large), str(tmp_path / "out"), str(small)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    told, grown = json.loads(done.stdout)
    assert told / 10 <= grown <= 1.1 * told, (told >> 20, grown >> 20)


TIGHT = """
import json, sys
from typer.testing import CliRunner
from flows.cli import app
options, source, target, warm = sys.argv[1:]
for place, made in ((warm, target + "-warm"), (source, target)):
    command = [*options.split(), "--memory-budget", "128MiB", "--json"]
    command[1:1] = [place, made]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
print(done.stdout)
"""


@pytest.mark.parametrize(
    "options",
    [
        "export --format hf --dtype bf16",
        pytest.param("reshard --dtype bf16 --to shard=3", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_casts_keeps_to_the_least_budget(options, tmp_path):
    torch.manual_seed(7)
    small, large = tmp_path / "small", tmp_path / "large"
    for place, rows in ((small, 8), (large, 5500)):
        save_state(checkpoint.open_store(str(place)), {"model": {"w": torch.randn(rows, 8192)}})
    command = [sys.executable, "-c", TIGHT, options, str(large), str(tmp_path / "out"), str(small)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert told["grown_bytes"] <= told["peak_bytes"] <= 128 << 20, told["grown_bytes"] >> 20


def test_a_command_that_makes_thousands_of_small_chunks_keeps_to_the_budget_too(tmp_path):
    torch.manual_seed(7)
    small, large = tmp_path / "small", tmp_path / "large"
    for place, rows in ((small, 128), (large, 1024)):
        weights = {f"layers.{n}.q_proj.weight": torch.randn(rows, 512) for n in range(40)}
        save_state(checkpoint.open_store(str(place)), {"model": weights})
    options = "reshard --to shard=16,tensor=8"
    command = [sys.executable, "-c", TIGHT, options, str(large), str(tmp_path / "out"), str(small)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert told["num_chunks"] == 40 * 16 * 8
    assert told["grown_bytes"] <= told["peak_bytes"] <= 128 << 20, told["grown_bytes"] >> 20


AVERAGING = """
import json, sys
import numpy, torch
from checkpoint import ConversionSettings, Adoption, open_store
from checkpoint.interop.conversion.importing import import_checkpoint
from checkpoint.interop.moves import Foreign
from tests.interop_samples import Files
from tests.unit.test_conversion_averages import MEAN, rules
class Ranks(Files):
    def read(self, number, box):
        return numpy.full(box.size, 0x3C00 + number, "<u2")
def convert(rows, target):
    ranks = [Foreign("w", "float16", (rows, 1024), {"tensor": rank}) for rank in range(8)]
    adoption, settings = Adoption(rules=rules(MEAN)), ConversionSettings(128 << 20)
    files = Ranks(ranks, None, {"tensor": 8})
    return import_checkpoint(files, "x", open_store(target), adoption, settings=settings)
convert(8, sys.argv[1] + "-warm")
report = convert(1 << 14, sys.argv[1])
print(json.dumps([report.peak_bytes, report.grown_bytes]))
"""


def test_a_process_that_averages_holds_one_rank_at_a_time(tmp_path):
    command = [sys.executable, "-c", AVERAGING, str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    told, grown = json.loads(done.stdout)
    assert grown <= 1.1 * told, (told >> 20, grown >> 20)


def test_large_tensors_in_many_chunks_are_told_block_by_block(tmp_path):
    torch.manual_seed(4)
    state = {
        "model": {"h.0.w": torch.randn(3000, 1100), "h.1.w": torch.zeros(1 << 22), "h.1.b": torch.ones(3)}
    }
    save_state(checkpoint.open_store(str(tmp_path / "large")), state)
    for number, options in enumerate(
        [("reshard", "--to", "tensor=3"), ("export", "--format", "dcp"), ("export", "--format", "hf")]
    ):
        check(options[0], str(tmp_path / "large"), tmp_path / f"to{number}", *options[1:])


def test_a_rehearsal_sees_what_keeps_an_export_from_its_target(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    (tmp_path / "file").write_text("x")
    memory, name = fsspec.filesystem("memory"), uuid.uuid4().hex
    memory.pipe_file(f"/{name}/.holdfast-draft-of-others", b"x")
    targets = (str(tmp_path / "file" / "sub"), StoreRefused), (f"memory://{name}", AlreadyExists)
    for target, error in targets:
        for act in (checkpoint.plan_export_foreign, checkpoint.export_foreign):
            with pytest.raises(error):
                act(checkpoint.Whereabouts(str(tmp_path / "a.pt")), target, checkpoint.Emigration("torch"))
    memory.rm(f"/{name}", recursive=True)
