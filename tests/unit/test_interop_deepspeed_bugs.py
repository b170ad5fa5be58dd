"""Bugs that DeepSpeed's own tools had, and files that are missing, stale, doubled or hostile: each is caught.

Made anew in a copy of files that DeepSpeed wrote; the numbers are those of DeepSpeed's issues.
"""

import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.errors import CheckpointError, Corrupt, Incomplete, Mismatch, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats import (
    deepspeed,
    deepspeed_parts,
    deepspeed_writing,
    deepspeed_zero_writing,
)
from checkpoint.interop.formats.deepspeed import open_deepspeed
from checkpoint.interop.formats.deepspeed_parts import Fragment
from checkpoint.interop.formats.deepspeed_universal import open_deepspeed_universal
from checkpoint.interop.formats.deepspeed_writing import write_deepspeed_universal
from checkpoint.interop.formats.masters import is_rounded
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place
from tests.interop.unpacking import rewrite, unpack
from tests.unit.test_interop_deepspeed import fingerprints

WRITTEN = pytest.mark.parametrize(
    ("format", "to", "room"),
    [
        ("deepspeed", "replica=2,zero=1", deepspeed_zero_writing),
        ("deepspeed", "replica=2,zero=3", deepspeed_zero_writing),
        ("deepspeed-universal", "replica=1", deepspeed_writing),
    ],
    ids=["zero-1", "zero-3", "universal"],
)
OPTIM = "{}zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def made(name: str, tmp_path: Path) -> Path:
    folder, _ = unpack(name, tmp_path)
    return folder / "global_step2"


def optim(folder: Path, rank: int) -> Path:
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def change_places(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def refuses(
    folder: Path, error: type[CheckpointError] | tuple[type[CheckpointError], ...], match: str
) -> None:
    with pytest.raises(error, match=match):
        open_deepspeed(Place(str(folder)))


# ---------------------------------------------------------------------------------- missing, doubled, stale


@pytest.mark.parametrize("name", ["zero2-bf16-3", "zero3-bf16-3"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_s_file_that_is_missing_is_named(name, rank, tmp_path):
    """Issue 7546: ranks other than the first wrote nothing."""
    folder = made(name, tmp_path)
    optim(folder, rank).unlink()
    what = f"no optim_states of rank {rank}" if rank < 2 else "was saved by 3 ranks, and .* the files of 2"
    refuses(folder, Incomplete, what)


def test_model_states_that_are_missing_are_named(tmp_path):
    folder = made("zero3-bf16-3", tmp_path)
    (folder / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    refuses(folder, Incomplete, "has model states of 2 of 3 ranks")
    folder = made("zero2-bf16-3", tmp_path / "two")
    (folder / "mp_rank_00_model_states.pt").unlink()
    refuses(folder, Incomplete, "has no mp_rank_00_model_states.pt")


def same(bits: np.ndarray, _: Box) -> np.ndarray:
    return bits


@pytest.mark.parametrize("rounded", [0x7FC0, 0x7FFF, 0xFFC0])
def test_nan_is_what_it_rounds_to_on_any_device(rounded):
    masters = np.array([0x7FC00000, 0x3F800000], np.uint32)
    for weights, is_same in (
        ([rounded, 0x3F80], True),
        ([rounded, 0x3F81], False),
        ([0x7F80, 0x3F80], False),
    ):
        bits = np.array(weights, np.uint16)
        weight = Foreign("w", "bfloat16", (2,))
        assert is_rounded(partial(same, masters), partial(same, bits), weight) is is_same


def test_a_universal_parameter_under_another_s_name_is_caught(tmp_path):
    folder, _ = unpack("zero1-bf16-2", tmp_path)
    (zero,) = folder.glob("*_universal/zero")
    (zero / "norm.weight").rename(zero / "kept")
    (zero / "norm.bias").rename(zero / "norm.weight")
    (zero / "kept").rename(zero / "norm.bias")
    with pytest.raises(Corrupt, match=r"is not what .* was rounded from"):
        open_deepspeed_universal(Place(str(folder)))


def test_files_left_from_a_larger_world_are_caught(tmp_path):
    """Issue 7599: stale files of the same names."""
    folder = made("zero2-bf16-3", tmp_path)
    shutil.copy(optim(folder, 2), folder / OPTIM.format("bf16_", 3))
    refuses(folder, Incomplete, "was saved by 3 ranks, and .* has the files of 4: some are missing, or left")


def test_two_files_of_one_rank_are_caught(tmp_path):
    folder = made("zero2-bf16-3", tmp_path)
    shutil.copy(optim(folder, 1), folder / OPTIM.format("", 1))
    refuses(folder, Corrupt, "zero_pp_rank_1_.* and .*zero_pp_rank_1_.*, both of one rank")


@pytest.mark.parametrize("name", ["zero2-bf16-3", "zero3-groups-2"])
def test_a_rank_s_file_of_another_step_is_caught(name, tmp_path):
    folder = made(name, tmp_path)
    key = "base_optimizer_state" if name.startswith("zero2") else "optimizer_state_dict"

    def advance(tree: Any) -> None:
        for state in tree["optimizer_state_dict"][key]["state"].values():
            state["step"] += 1

    rewrite(optim(folder, 1), advance)
    refuses(folder, Corrupt, "zero_pp_rank_1_.* is of another step than .*zero_pp_rank_0_")


@pytest.mark.parametrize("name", ["zero2-bf16-3", "zero3-groups-2"])
def test_a_rank_s_file_without_an_optimizer_is_caught(name, tmp_path):
    """Issue 6691: a resumed run that behaves as if from scratch."""
    folder = made(name, tmp_path)
    key = "base_optimizer_state" if name.startswith("zero2") else "optimizer_state_dict"
    rewrite(optim(folder, 1), lambda tree: tree["optimizer_state_dict"][key]["state"].clear())
    refuses(folder, Incomplete, "zero_pp_rank_1_.* has no optimizer state, and others have")


def test_partitions_of_the_wrong_size_are_caught(tmp_path):
    def shorten(key: str) -> Callable[[Any], None]:
        def change(tree: Any) -> None:
            flats = tree["optimizer_state_dict"][key]
            flats[0] = flats[0][:-2].clone()

        return change

    folder = made("zero3-bf16-3", tmp_path)
    rewrite(optim(folder, 1), shorten("fp32_flat_groups"))
    refuses(folder, Corrupt, "zero_pp_rank_1_.* has a partition of 72 elements, .* divided by 3, take 74")
    folder = made("zero2-bf16-3", tmp_path / "two")
    rewrite(optim(folder, 0), shorten("single_partition_of_fp32_groups"))
    refuses(folder, Corrupt, "zero_pp_rank_0_.*: elements .* overlap others or lie beyond")


def test_a_model_of_other_shapes_is_caught(tmp_path):
    folder = made("zero2-bf16-3", tmp_path)

    def enlarge(tree: Any) -> None:
        tree["param_shapes"][0]["up.weight"] = tree["param_shapes"][0]["down.weight"]

    rewrite(folder / "mp_rank_00_model_states.pt", enlarge)
    refuses(folder, Mismatch, r"'up.weight' has the shape \(13, 6\), and should have \(6, 13\)")


def test_a_part_that_two_ranks_claim_is_caught(tmp_path):
    folder = made("zero2-bf16-3", tmp_path)

    def widen(tree: Any) -> None:
        address = tree["optimizer_state_dict"]["param_slice_mappings"][0]["embed.weight"]
        address.numel += 1

    rewrite(optim(folder, 0), widen)
    refuses(folder, Corrupt, "elements .* overlap others or lie beyond")


# ------------------------------------------------------------------------------------------ wrong arithmetic


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero2-bf16-3"])
def test_flat_parts_that_the_reader_takes_from_a_wrong_offset_are_refused(name, tmp_path, monkeypatch):
    """Issue 7584: with several groups, an offset is off by what those before it were padded with."""
    folder = made(name, tmp_path)
    open_deepspeed(Place(str(folder)))
    plain = deepspeed_parts.fragments_of

    def shifted(*args: Any) -> dict[str, list[Fragment]]:
        found = plain(*args)
        first = found["norm.bias"][0]
        found["norm.bias"][0] = Fragment(first.file, first.group, first.start - 1, first.first, first.numel)
        return found

    monkeypatch.setattr(deepspeed, "fragments_of", shifted)
    refuses(folder, Corrupt, "master.norm.bias is not what norm.bias was rounded from")


@pytest.mark.parametrize("dropped", ["head.weight", "scale"])
@WRITTEN
def test_tied_weights_and_buffers_that_a_writer_drops_are_caught(
    format, to, room, dropped, tmp_path, monkeypatch
):
    """Issues 1896 and 3824."""
    source = Whereabouts(str(made("zero3-bf16-3", tmp_path).parent), format="deepspeed")
    export_foreign(source, str(tmp_path / "sound"), Emigration(format, to))
    plain = deepspeed_writing.parts_of

    def without(contents: Any) -> Any:
        parts = plain(contents)
        del parts.weights[dropped]
        return parts

    monkeypatch.setattr(room, "parts_of", without)
    with pytest.raises(Mismatch, match=dropped):
        export_foreign(source, str(tmp_path / "out"), Emigration(format, to))
    assert not (tmp_path / "out").exists()


def universal(tmp_path: Path) -> Path:
    opened = open_deepspeed(Place(str(made("zero2-bf16-3", tmp_path / "made"))))
    with drafting(str(tmp_path / "universal"), "one") as draft:
        write_deepspeed_universal(draft, opened, 1 << 16)
    return tmp_path / "universal/global_step2_universal"


class Zeroed:
    """A checkpoint of which one tensor is zero when it is read."""

    def __init__(self, contents: Any, name: str) -> None:
        self.about, self.tensors = contents.about, contents.tensors
        self._contents, self._name = contents, name

    def read(self, number: int, box: Box) -> np.ndarray:
        bits = self._contents.read(number, box)
        return np.zeros_like(bits) if self.tensors[number].name == self._name else bits


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
@WRITTEN
def test_states_that_a_writer_leaves_zero_are_caught(format, to, room, state, tmp_path, monkeypatch):
    """Issue 6791: the writer of shards changed the dict that it read from; exit code 0."""
    source = Whereabouts(str(made("zero3-bf16-3", tmp_path).parent), format="deepspeed")
    write = f"write_{format.replace('-', '_')}"
    plain = getattr(room, write)

    def zeroing(draft: Any, contents: Any, budget_bytes: int) -> None:
        plain(draft, Zeroed(contents, f"optimizer.{state}.up.weight"), budget_bytes)

    monkeypatch.setattr(room, write, zeroing)
    with pytest.raises(Mismatch, match=rf"1 of its 33 tensors differ .*up\.weight/{state}"):
        export_foreign(source, str(tmp_path / "out"), Emigration(format, to))
    assert not (tmp_path / "out").exists()


def test_masters_that_a_writer_left_zero_are_caught(tmp_path):
    folder = universal(tmp_path)
    rewrite(folder / "zero/up.weight/fp32.pt", lambda tree: tree["param"].zero_())
    with pytest.raises(Corrupt, match=r"master.up.weight is not what up.weight was rounded from"):
        open_deepspeed_universal(Place(str(folder)))


@pytest.mark.parametrize(
    ("break_it", "error", "match"),
    [
        (lambda f: shutil.rmtree(f / "zero/up.bias"), Incomplete, "no zero/up.bias, which the model states"),
        (lambda f: (f / "zero/up.bias/exp_avg.pt").unlink(), Incomplete, "no zero/up.bias/exp_avg.pt"),
        (lambda f: (f / "zero/up.bias/fp32.pt").unlink(), Incomplete, "no zero/up.bias/fp32.pt"),
        (lambda f: (f / "zero/up.bias/step.pt").unlink(), Incomplete, "no zero/up.bias/step.pt, and others"),
        (lambda f: (f / "zero/optimizer_state.pt").unlink(), Incomplete, "has no zero/optimizer_state.pt"),
        (
            lambda f: shutil.copytree(f / "zero/up.bias", f / "zero/gone.bias"),
            Corrupt,
            "has zero/gone.bias, which the model does not",
        ),
        (
            lambda f: shutil.copy(f / "zero/up.weight/exp_avg.pt", f / "zero/up.bias/exp_avg.pt"),
            Mismatch,
            r"zero/up.bias/exp_avg.pt .* has the shape \(13, 6\), the model says \(13,\)",
        ),
        (
            lambda f: rewrite(f / "zero/up.bias/step.pt", lambda step: step.add_(1)),
            Corrupt,
            "zero/up.bias/step.pt .* is of another step",
        ),
        (
            lambda f: shutil.copy(f / "zero/up.bias/step.pt", f / "zero/up.bias/fp32.pt"),
            Mismatch,
            r"has the shape \(\)",
        ),
    ],
)
def test_universal_folders_that_are_incomplete_or_stale_are_caught(break_it, error, match, tmp_path):
    folder = universal(tmp_path)
    break_it(folder)
    with pytest.raises(error, match=match):
        open_deepspeed_universal(Place(str(folder)))


def test_a_universal_checkpoint_needs_every_state_of_every_parameter(tmp_path):
    opened = open_deepspeed(Place(str(made("zero2-bf16-3", tmp_path))))
    opened.tensors = tuple(t for t in opened.tensors if t.name != "optimizer.exp_avg_sq.up.weight")
    with (
        pytest.raises(Incomplete, match=r"the parameter 'up.weight' lacks \['exp_avg_sq'\]"),
        drafting(str(tmp_path / "universal"), "one") as draft,
    ):
        write_deepspeed_universal(draft, opened, 1 << 16)
    assert not (tmp_path / "universal").exists()


# ------------------------------------------------------------------------------------------------- hostile


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Shell:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("exit 1",)


def put_pickle(path: Path, value: Any) -> None:
    """Replace the pickle in a file of torch.save."""
    with zipfile.ZipFile(path) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, data in entries:
            new.writestr(name, pickle.dumps(value, 2) if name.endswith("/data.pkl") else data)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("name", ["optim", "model"])
def test_code_in_a_pickle_is_refused_and_never_run(name, tmp_path):
    folder = made("zero2-bf16-3", tmp_path)
    path = optim(folder, 1) if name == "optim" else folder / "mp_rank_00_model_states.pt"
    put_pickle(path, {"optimizer_state_dict": Bomb(tmp_path / "ran")})
    with pytest.raises((Unsupported, Corrupt), match=path.name):
        fingerprints(open_deepspeed(Place(str(folder))))
    put_pickle(path, {"optimizer_state_dict": Shell()})
    refuses(folder, Unsupported, f"{path.name}.*names 'posix.system'.*nothing of it was executed")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tree", [None, [], {}, {"optimizer_state_dict": None}, {"optimizer_state_dict": []}, 3]
)
def test_files_that_hold_something_else_are_refused_by_name(tree, tmp_path):
    folder = made("zero2-bf16-3", tmp_path)
    put_pickle(optim(folder, 1), tree)
    refuses(folder, Corrupt, "zero_pp_rank_1_.* is no file of ZeRO's optimizer states")


@pytest.mark.parametrize("tree", [None, [], {}, {"param_shapes": None}, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_model_states_that_are_something_else_are_refused_by_name(tree, rank, tmp_path):
    folder = made("zero3-bf16-3", tmp_path)
    put_pickle(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", tree)
    refuses(folder, Corrupt, f"zero_pp_rank_{rank}_.*model_states.pt (is no file|does not say what shapes)")


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1, -40])
def test_a_file_cut_short_is_refused_by_name(keep, tmp_path):
    folder = made("zero2-bf16-3", tmp_path)
    path = optim(folder, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="zero_pp_rank_1_"):
        open_deepspeed(Place(str(folder)))


def test_parts_of_pipelines_and_experts_are_refused_rather_than_left_out(tmp_path):
    folder = made("zero2-bf16-3", tmp_path)
    shutil.copy(optim(folder, 0), folder / "layer_00-model_00-model_states.pt")
    refuses(folder, Unsupported, "layer_00-model_00-model_states.pt .* belongs to a pipeline or to experts")
