"""Checkpoints that DeepSpeed made, read whole and by boxes, and written as its universal folders.

Their golden tensors are what DeepSpeed itself said its parameters and moments were.
"""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.errors import Corrupt, Incomplete, Unsupported
from checkpoint.format.box import Box
from checkpoint.format.fingerprint import fingerprint
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.formats.deepspeed import looks_like_deepspeed, open_deepspeed
from checkpoint.interop.formats.deepspeed_universal import (
    looks_like_deepspeed_universal,
    open_deepspeed_universal,
)
from checkpoint.interop.formats.deepspeed_writing import write_deepspeed_universal
from checkpoint.interop.formats.deepspeed_zero_writing import write_deepspeed
from checkpoint.interop.formats.rounding import round_bits, widen_bits
from checkpoint.interop.place import Place
from tests.interop.unpacking import rewrite, unpack, values_of

MADE = ["zero1-bf16-2", "zero2-bf16-3", "zero2-fp32-2", "zero3-bf16-3", "zero3-groups-2"]
PYTHON = Path(__file__).resolve().parents[2] / ".venv-deepspeed/bin/python"
SHAPES = {
    "embed.weight": (11, 6),
    "up.weight": (13, 6),
    "down.weight": (6, 13),
    "up.bias": (13,),
    "norm.weight": (13,),
    "norm.bias": (13,),
}


def fingerprints(opened: ForeignCheckpoint) -> dict[str, int]:
    return {
        tensor.name: fingerprint(
            opened.read(number, Box.whole(tensor.shape)), tensor.dtype, tensor.shape, Box.whole(tensor.shape)
        )
        for number, tensor in enumerate(opened.tensors)
    }


@pytest.mark.parametrize("made", MADE)
def test_every_master_and_moment_is_what_deepspeed_said(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    shapes = {tensor.name: tensor.shape for tensor in opened.tensors}
    assert len(shapes) == len(opened.tensors)
    for name, shape in SHAPES.items():
        for state in ("master", "exp_avg", "exp_avg_sq"):
            assert shapes[f"optimizer.{state}.{name}"] == shape
        assert values_of(opened, f"optimizer.step.{name}") == 2
    assert len(golden) == 19  # three states of six parameters, and a buffer
    for name, expected in golden.items():
        assert (values_of(opened, name) == expected).all(), name
    assert opened.about.step == 2
    assert opened.about.extra["cursor"] == 17
    assert opened.about.extra["zero"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    "made", ["zero2-bf16-3", "zero3-groups-2"]
)  # the latter has two groups cut into four
def test_the_optimizer_s_groups_are_told_by_the_names_of_their_parameters(made, tmp_path):
    folder, _ = unpack(made, tmp_path)
    groups = open_deepspeed(Place(str(folder))).about.extra["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["params"]) for group in groups] == [
        (0.1, ["embed.weight", "up.weight", "down.weight"]),
        (0.0, ["up.bias", "norm.weight", "norm.bias"]),
    ]


@pytest.mark.parametrize("made", MADE)
def test_weights_are_the_masters_rounded_and_tied_and_frozen_ones_are_there(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    names = {tensor.name: tensor for tensor in opened.tensors}
    dtype = "float32" if "fp32" in made else "bfloat16"
    for name in SHAPES:
        assert names[name].dtype == dtype
        master = golden[f"optimizer.master.{name}"]
        rounded = widen_bits(round_bits(master.view(np.uint32), dtype), dtype).view(np.float32)
        assert (values_of(opened, name) == rounded).all()
    assert (values_of(opened, "head.weight") == values_of(opened, "embed.weight")).all()
    assert names["frozen.weight"].shape == (6, 6)
    assert len(np.unique(values_of(opened, "frozen.weight"))) > 20
    assert names["scale"].dtype == "float32"


@pytest.mark.parametrize("made", ["zero1-bf16-2", "zero3-groups-2"])
def test_any_box_of_any_tensor_can_be_read(made, tmp_path):
    folder, _ = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    random = np.random.default_rng(0)
    for number, tensor in enumerate(opened.tensors):
        whole = opened.read(number, Box.whole(tensor.shape))
        for _ in range(5):
            start = tuple(int(random.integers(0, n + 1)) for n in tensor.shape)
            size = tuple(int(random.integers(0, n - a + 1)) for a, n in zip(start, tensor.shape, strict=True))
            box = Box(start, size)
            assert (opened.read(number, box) == whole[box.within(Box.whole(tensor.shape))]).all()


def test_reading_a_row_reads_little_more_than_the_row(tmp_path, monkeypatch):
    folder, _ = unpack("zero2-bf16-3", tmp_path)
    place = Place(str(folder))
    opened = open_deepspeed(place)
    number = [tensor.name for tensor in opened.tensors].index("optimizer.exp_avg.down.weight")
    seen: list[int] = []
    for method in ("read", "read_into"):
        plain = getattr(Place, method)

        def spy(self: Place, path: str, offset: int = 0, what: Any = None, plain: Any = plain) -> Any:
            seen.append(what if isinstance(what, int) else what.nbytes)
            return plain(self, path, offset, what)

        monkeypatch.setattr(Place, method, spy)
    opened.read(number, Box((2, 0), (1, 13)))
    assert sum(seen) <= 13 * 4 + 2 * 30  # and a header of the zip for each part


@pytest.mark.parametrize("made", ["zero1-bf16-2", "zero3-bf16-3"])
def test_the_universal_folders_of_deepspeed_s_own_converter_hold_the_same(made, tmp_path):
    folder, golden = unpack(made, tmp_path)
    place = Place(str(folder))
    assert looks_like_deepspeed_universal(place.files)
    opened = open_deepspeed_universal(place)
    for name, expected in golden.items():
        assert (values_of(opened, name) == expected).all(), name
    direct = open_deepspeed(place)
    assert fingerprints(direct) == fingerprints(opened)


@pytest.mark.parametrize("made", ["zero2-bf16-3", "zero3-groups-2"])
def test_universal_folders_tell_which_parameters_a_group_has(made, tmp_path):
    """ZeRO-3 lists sub-groups, of which its optimizer's groups say how many they have."""
    folder, _ = unpack(made, tmp_path)
    with drafting(str(tmp_path / "universal"), "one") as draft:
        write_deepspeed_universal(draft, open_deepspeed(Place(str(folder))), 1 << 16)
    told = open_deepspeed_universal(Place(str(tmp_path / "universal"))).about.extra
    groups = told["optimizer"]["param_groups"]
    assert [(group["weight_decay"], sorted(group["params"])) for group in groups] == [
        (0.1, ["down.weight", "embed.weight", "up.weight"]),
        (0.0, ["norm.bias", "norm.weight", "up.bias"]),
    ]


@pytest.mark.parametrize("made", MADE)
def test_what_is_written_as_universal_folders_comes_back_bit_by_bit(made, tmp_path):
    folder, _ = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    target = str(tmp_path / "universal")
    with drafting(target, "one") as draft:
        write_deepspeed_universal(draft, opened, 1 << 16)
    back = open_deepspeed_universal(Place(target))
    assert fingerprints(back) == fingerprints(opened)
    assert back.about.step == 2
    assert back.about.extra["cursor"] == 17


class Relaid:
    """A checkpoint for another number of ranks."""

    def __init__(self, opened: ForeignCheckpoint, **extra: Any) -> None:
        self.about = replace(opened.about, extra={**opened.about.extra, **extra})
        self.tensors, self.read = opened.tensors, opened.read


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "made", ["zero1-bf16-2", "zero2-bf16-3", "zero2-fp32-2", "zero3-bf16-3", "zero3-groups-2"]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_written_for_any_stage_and_world_comes_back_bit_by_bit(made, world, stage, tmp_path):
    folder, _ = unpack(made, tmp_path)
    opened = open_deepspeed(Place(str(folder)))
    target = str(tmp_path / "written")
    with drafting(target, "one") as draft:
        write_deepspeed(draft, Relaid(opened, dp_world_size=world, zero_stage=stage), 1 << 16)
    back = open_deepspeed(Place(target))
    assert back.about.notes == (f"saved by {world} ranks with ZeRO stage {stage}",)
    assert fingerprints(back) == fingerprints(opened)


def test_partitions_are_not_written_where_the_order_of_parameters_is_not_known(tmp_path):
    folder, _ = unpack("zero2-bf16-3", tmp_path)
    contents = Relaid(open_deepspeed(Place(str(folder))), param_shapes=None)
    with (
        pytest.raises(Unsupported, match=r"by position, .* write deepspeed-universal, which goes by names"),
        drafting(str(tmp_path / "written"), "one") as draft,
    ):
        write_deepspeed(draft, contents, 1 << 16)


def test_a_folder_of_a_tag_is_a_checkpoint_too_and_latest_says_which_of_several(tmp_path):
    folder, _ = unpack("zero2-bf16-3", tmp_path)
    assert looks_like_deepspeed(Place(str(folder)).files)
    assert looks_like_deepspeed(Place(str(folder / "global_step2")).files)
    assert not looks_like_deepspeed_universal(Place(str(folder)).files)
    whole = fingerprints(open_deepspeed(Place(str(folder))))
    assert fingerprints(open_deepspeed(Place(str(folder / "global_step2")))) == whole
    (folder / "latest").write_text("global_step3")
    with pytest.raises(Incomplete, match=r"latest in .* names 'global_step3', and there is no such folder"):
        open_deepspeed(Place(str(folder)))
    (folder / "latest").unlink()
    shutil.copytree(folder / "global_step2", folder / "global_step4")
    with pytest.raises(Unsupported, match=r"holds .'global_step2', 'global_step4'. and no file `latest`"):
        open_deepspeed(Place(str(folder)))


def test_16_bit_values_are_rounded_as_torch_does():
    import torch

    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 200_000, np.uint32)
    halves = np.arange(0x3F800000, 0x3F800000 + 0x20000, 0x4000, dtype=np.uint32)  # ties, to even
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x477FF000, 0x1], np.uint32)
    bits = np.concatenate([bits, halves, special])
    values = torch.from_numpy(bits.view(np.float32))
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        expected = values.to(dtype)
        found = torch.from_numpy(round_bits(bits, name).view(np.int16)).view(dtype)
        is_nan = expected.isnan()
        assert (found.isnan() == is_nan).all()
        assert (found[~is_nan] == expected[~is_nan]).all()
        wide = widen_bits(round_bits(bits, name), name).view(np.float32)
        assert (wide[~is_nan.numpy()] == expected[~is_nan].float().numpy()).all()


# --------------------------------------------------------------------------------- with DeepSpeed itself


def load_in_deepspeed(folder: str, tmp_path: Path, *options: str) -> dict[str, np.ndarray]:
    """Return what an engine says that it has after it loaded a checkpoint; also check what it saves then."""
    command = [str(PYTHON), "-m", "tests.interop.deepspeed_make", str(tmp_path / "back"), "--steps", "0"]
    command += ["--load", folder, "--sub-group", "30", *options]
    subprocess.run(command, cwd=PYTHON.parents[2], check=True, timeout=300, capture_output=True)
    with np.load(tmp_path / "back/golden.npz") as found:
        golden = {name: found[name] for name in found.files}
    saved = open_deepspeed(Place(str(tmp_path / "back/checkpoint")))
    assert all((values_of(saved, name) == golden[name]).all() for name in golden)
    return golden


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs DeepSpeed: see tests/interop/deepspeed.txt")
@pytest.mark.parametrize(("made", "stage", "world"), [("zero1-bf16-2", 3, 2), ("zero3-groups-2", 2, 3)])
def test_deepspeed_loads_our_universal_folders_in_another_stage_and_world(made, stage, world, tmp_path):
    folder, golden = unpack(made, tmp_path / "made")
    target = str(tmp_path / "universal")
    with drafting(target, "one") as draft:
        write_deepspeed_universal(draft, open_deepspeed(Place(str(folder))), 1 << 16)
    found = load_in_deepspeed(target, tmp_path, "--stage", str(stage), "--world", str(world), "--universal")
    assert found.keys() == golden.keys()
    assert all((found[name] == golden[name]).all() for name in golden)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs DeepSpeed: see tests/interop/deepspeed.txt")
@pytest.mark.parametrize(
    ("made", "stage", "world"),
    [("zero3-bf16-3", 2, 2), ("zero3-groups-2", 1, 3), ("zero1-bf16-2", 3, 3), ("zero3-groups-2", 3, 3)],
)
def test_deepspeed_loads_the_partitions_that_we_write_for_another_stage_and_world(
    made, stage, world, tmp_path
):
    folder, golden = unpack(made, tmp_path / "made")
    config = {"zero_optimization": {"sub_group_size": 30}}
    contents = Relaid(
        open_deepspeed(Place(str(folder))), dp_world_size=world, zero_stage=stage, ds_config=config
    )
    target = str(tmp_path / "written")
    with drafting(target, "one") as draft:
        write_deepspeed(draft, contents, 1 << 16)
    found = load_in_deepspeed(target, tmp_path, "--stage", str(stage), "--world", str(world))
    assert found.keys() == golden.keys()
    assert all((found[name] == golden[name]).all() for name in golden)


@pytest.mark.parametrize("name", ["zero2-fp32-2", "zero2-bf16-3"])
def test_partitions_that_were_dealt_round_robin_are_refused(name, tmp_path):
    folder, _ = unpack(name, tmp_path)

    def deal(tree) -> None:
        tree["ds_config"]["zero_optimization"]["round_robin_gradients"] = True

    open_deepspeed(Place(str(folder)))
    for model in folder.glob("global_step*/*model_states.pt"):
        rewrite(model, deal)
    with pytest.raises(Unsupported, match="`round_robin_gradients: true`"):
        open_deepspeed(Place(str(folder)))


def test_states_in_another_order_are_refused(tmp_path):
    folder, _ = unpack("zero2-bf16-3", tmp_path)

    def exchange(tree) -> None:
        one = tree["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
        one.data.copy_(one.flip(0))

    rewrite(next(folder.glob("global_step2/*zero_pp_rank_0_*optim_states.pt")), exchange)
    with pytest.raises(Corrupt, match=r"is not what .* was rounded from"):
        open_deepspeed(Place(str(folder)))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs DeepSpeed: see tests/interop/deepspeed.txt")
def test_deepspeed_counts_on_from_a_step_that_was_a_plain_number(tmp_path):
    folder, _ = unpack("zero1-bf16-2", tmp_path / "made")
    opened = open_deepspeed(Place(str(folder)))
    target = str(tmp_path / "universal")
    with drafting(target, "one") as draft:
        write_deepspeed_universal(draft, PlainSteps(opened, 7), 1 << 16)
    command = [str(PYTHON), "-m", "tests.interop.deepspeed_make", str(tmp_path / "back"), "--steps", "1"]
    command += ["--load", target, "--universal", "--stage", "2", "--world", "2"]
    subprocess.run(command, cwd=PYTHON.parents[2], check=True, timeout=300, capture_output=True)
    saved = open_deepspeed(Place(str(tmp_path / "back/checkpoint")))
    assert {float(values_of(saved, f"optimizer.step.{name}")) for name in SHAPES} == {8.0}


class PlainSteps:
    """A checkpoint whose optimizer keeps its steps as plain numbers."""

    def __init__(self, opened: ForeignCheckpoint, step: int) -> None:
        names = [one.name.removeprefix("optimizer.step.") for one in opened.tensors]
        self._kept = [n for n, one in enumerate(opened.tensors) if not one.name.startswith("optimizer.step.")]
        told = {"state": {name: {"step": step} for name in names if name in SHAPES}}
        optimizer = {**opened.about.extra["optimizer"], **told}
        self.about = replace(opened.about, extra={**opened.about.extra, "optimizer": optimizer})
        self.tensors = [opened.tensors[number] for number in self._kept]
        self._opened = opened

    def read(self, number: int, box: Box) -> np.ndarray:
        return self._opened.read(self._kept[number], box)
