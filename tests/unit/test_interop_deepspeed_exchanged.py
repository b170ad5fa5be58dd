"""Files of ranks under each other's names, and copies of another rank's: every shape and count agrees."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.errors import Corrupt, Incomplete
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.deepspeed import open_deepspeed
from checkpoint.interop.formats.deepspeed_zero_writing import write_deepspeed
from checkpoint.interop.place import Place
from tests.interop.unpacking import rewrite, stand_ins, unpack
from tests.unit.test_interop_deepspeed import Relaid
from tests.unit.test_interop_deepspeed_bugs import change_places, made, optim, refuses

SAVED_AS = "zero_pp_rank_0_.* was saved as .*zero_pp_rank_1_.*: .* under each other's names"
SWAPPED = "is not what .* was rounded from: .* of another rank or step|is one of another"


def nameless(folder: Path) -> Path:
    """Let files not say under which names they were saved, as where torch.save writes to an open file."""
    for path in folder.glob("*_states.pt"):
        with stand_ins():
            tree = torch.load(path, weights_only=False, map_location="cpu")
            buffer = io.BytesIO()
            torch.save(tree, buffer)
        path.write_bytes(buffer.getvalue())
    return folder


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero2-bf16-3", "zero3-bf16-3"])
def test_a_rank_s_file_that_is_a_copy_of_another_s_is_caught(name, tmp_path):
    folder = nameless(made(name, tmp_path))
    shutil.copy(optim(folder, 0), optim(folder, 1))
    with pytest.raises((Corrupt, Incomplete), match=r"zero_pp_rank_.*(one is a copy of the other|a copy of)"):
        open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero2-bf16-3", "zero2-fp32-2"])
def test_two_ranks_files_in_each_other_s_place_are_caught_by_what_they_hold(name, tmp_path):
    folder = nameless(made(name, tmp_path))
    open_deepspeed(Place(str(folder)))
    change_places(optim(folder, 0), optim(folder, 1))
    refuses(folder, (Corrupt, Incomplete), SWAPPED)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("zero3-groups-2", 0), ("zero3-groups-2", 1), ("zero3-bf16-3", 0), ("zero3-bf16-3", 1)],
)
def test_two_ranks_files_of_zero_3_in_each_other_s_place_are_caught_by_where_they_are_padded(
    name, rank, tmp_path
):
    """Issue 7584. Masters are no help: weights are what they round to, whatever they are."""
    folder = nameless(made(name, tmp_path))
    open_deepspeed(Place(str(folder)))
    last = int(name[-1]) - 1
    change_places(optim(folder, rank), optim(folder, last if rank < last else 0))
    refuses(
        folder,
        Corrupt,
        "has something where the exp_avg of .* is padded for rank . of ., and .*: it is another rank's",
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["ds_config"]["zero_optimization"].update(offload_optimizer={"device": "nvme"}),
        lambda tree: tree.pop("ds_config"),
    ],
)
def test_what_pads_moments_is_not_believed_where_it_may_be_anything(change, tmp_path):
    folder = nameless(made("zero3-bf16-3", tmp_path))
    for model in folder.glob("*model_states.pt"):
        rewrite(model, change)
    change_places(optim(folder, 1), optim(folder, 2))
    open_deepspeed(Place(str(folder)))


def test_what_pads_moments_is_not_looked_at_where_weights_decay_into_them(tmp_path):
    """Masters' padding is what was in memory, and L2 decay adds it to the gradients."""
    folder = made("zero3-bf16-3", tmp_path)

    def decay(tree: Any) -> None:
        for group in tree["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]:
            group.update(weight_decay=0.1, decoupled_weight_decay=False)

    for rank in range(3):
        rewrite(optim(folder, rank), decay)
    nameless(folder)
    change_places(optim(folder, 1), optim(folder, 2))
    open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero2-bf16-3", "zero2-fp32-2", "zero3-bf16-3"])
def test_files_under_each_other_s_names_are_caught_by_the_names_that_they_were_saved_under(name, tmp_path):
    """Sorted as texts, rank 10 comes before rank 2: every shape, count and norm agrees."""
    folder = made(name, tmp_path)
    change_places(optim(folder, 0), optim(folder, 1))
    refuses(folder, (Corrupt, Incomplete), "|".join([SAVED_AS, SWAPPED]))


def test_model_states_under_each_other_s_names_are_caught(tmp_path):
    """Each has a part of the frozen weights."""
    folder = made("zero3-bf16-3", tmp_path)
    states = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    change_places(folder / states.format(0), folder / states.format(1))
    refuses(folder, Corrupt, SAVED_AS)


def test_a_swap_of_ranks_that_hold_the_middle_of_one_weight_is_caught(tmp_path):
    """Its ends are in other ranks' files."""
    folder, _ = unpack("zero2-bf16-3", tmp_path)
    target = tmp_path / "written"
    with drafting(str(target), "one") as draft:
        write_deepspeed(
            draft, Relaid(open_deepspeed(Place(str(folder))), dp_world_size=24, zero_stage=2), 1 << 16
        )
    open_deepspeed(Place(str(target)))
    change_places(optim(target / "global_step2", 5), optim(target / "global_step2", 6))
    refuses(target, (Corrupt, Incomplete), SWAPPED)


def test_model_states_that_are_a_copy_of_another_rank_s_are_caught_by_the_frozen_weights(tmp_path):
    folder = made("zero3-bf16-3", tmp_path)
    states = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    shutil.copy(folder / states.format(0), folder / states.format(1))
    refuses(folder, Corrupt, "zero_pp_rank_1_.*model_states.pt and .*zero_pp_rank_0_.* hold the same")
