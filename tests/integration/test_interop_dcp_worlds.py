"""Checkpoints of torch's own ranks, however they shard: what we read is what they held, and back again."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.format.box import Box
from checkpoint.interop.formats.known import open_foreign
from tests.foreign_samples import check_same, contents_of, named, rewritten, some_boxes

pytestmark = pytest.mark.slow

LAYOUTS = ("fsdp2", "hsdp", "tensor", "tensor-data", "fsdp1", "ddp")


def run(root: Path, verb: str, size: int) -> None:
    """Run a world to its end; every rank has to end well."""
    command = [sys.executable, "-m", "tests.integration.dcp_rank", str(root), verb, str(size)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert told.returncode == 0, told.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dcp")
    run(root, "save", 4)
    return root


def reference(root: Path, layout: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / f"{layout}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_and_optimizer_are_read_as_torch_gathers_them(saved, layout):
    found = open_foreign(str(saved / layout))
    expected = reference(saved, layout)
    check_same(contents_of(found), named(expected))
    assert found.about.extra["cursor"] == {"epoch": 2, "seen": [1, 2, 3]}
    groups = found.about.extra["optimizer"]["param_groups"]
    told = expected["optim"]["param_groups"]
    assert [sorted(group["params"]) for group in groups] == [sorted(group["params"]) for group in told]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (0.02, 0.01)]


@pytest.mark.parametrize("layout", ["fsdp2", "tensor-data"])
def test_any_box_is_read_across_the_files_of_the_ranks(saved, layout):
    found = open_foreign(str(saved / layout))
    expected = named(reference(saved, layout))
    for number, tensor in enumerate(found.tensors):
        for box in some_boxes(tensor.shape, number):
            part = expected[tensor.name][box.within(Box.whole(tensor.shape))]
            assert found.read(number, box).tobytes() == part.contiguous().numpy().tobytes()


def test_every_layout_holds_the_same_names_and_shapes(saved):
    told = {layout: sorted(map(str, open_foreign(str(saved / layout)).tensors)) for layout in LAYOUTS}
    assert len({tuple(names) for names in told.values()}) == 1


def test_what_we_write_is_loaded_by_two_ranks_of_fsdp2(saved):
    rewritten(open_foreign(str(saved / "fsdp2")), "dcp", saved / "ours")
    run(saved, "load", 2)


def test_one_file_of_torch_save_holds_what_the_ranks_held(saved, tmp_path):
    written = rewritten(open_foreign(str(saved / "tensor-data")), "torch", tmp_path / "out")
    expected = reference(saved, "tensor-data")
    check_same(contents_of(written), named(expected))
    loaded = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert loaded["model"].keys() == expected["model"].keys()
    names = [name for group in loaded["optim"]["param_groups"] for name in group["param_names"]]
    assert torch.equal(
        loaded["optim"]["state"][names.index("up.weight")]["exp_avg"],
        expected["optim"]["state"]["up.weight"]["exp_avg"],
    )
