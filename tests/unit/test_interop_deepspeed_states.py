"""What DeepSpeed's files say of an optimizer's states: whether there are any, and where they lie."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.errors import Incomplete
from checkpoint.format.box import Box
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.deepspeed import open_deepspeed
from checkpoint.interop.formats.deepspeed_universal import open_deepspeed_universal
from checkpoint.interop.formats.deepspeed_zero_writing import write_deepspeed
from checkpoint.interop.formats.masters import is_rounded
from checkpoint.interop.formats.rounding import round_bits
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place
from tests.interop.unpacking import rewrite, stand_ins, unpack, values_of
from tests.unit.test_interop_deepspeed import SHAPES, Relaid

LOST = "has no rank's optimizer states, though steps were done with .*: they were lost"
NONE = "holds no states of the optimizer: whatever goes on from it begins with new ones"


def base_of(tree: Any) -> Any:
    """Return the state of the optimizer that ZeRO wraps."""
    zero = tree["optimizer_state_dict"]
    return zero.get("base_optimizer_state", zero.get("optimizer_state_dict"))


def emptied(name: str, tmp_path: Path, *changes: Callable[[Any], None]) -> Place:
    """Empty the states of all ranks, and change the files further."""
    folder, _ = unpack(name, tmp_path)

    def change(tree: Any) -> None:
        if "optimizer_state_dict" in tree:
            base_of(tree)["state"].clear()
        for one in changes:
            one(tree)

    for path in folder.glob("global_step2/*_states.pt"):
        rewrite(path, change)
    return Place(str(folder / "global_step2"))


def counted(**counters: int) -> Callable[[Any], None]:
    """Let the engine say that it counted so far."""

    def change(tree: Any) -> None:
        if "global_steps" in tree:
            tree.update(counters)

    return change


def grouped(*dropped: str, **options: Any) -> Callable[[Any], None]:
    """Change the options of the optimizer's groups."""

    def change(tree: Any) -> None:
        for group in base_of(tree)["param_groups"] if "optimizer_state_dict" in tree else ():
            for key in dropped:
                del group[key]
            group.update(options)

    return change


# ------------------------------------------------------------------------------------------------- no states


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero2-bf16-3", "zero2-fp32-2", "zero3-groups-2"])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        (grouped("betas", momentum=0.9),),
        (counted(global_steps=2, skipped_steps=1),),
        (counted(global_steps=0), grouped(step=2)),
    ],
)
def test_states_that_no_rank_has_though_steps_were_done_are_lost(name, changes, tmp_path):
    """Issue 6691: a resumed run that behaves as if from scratch."""
    with pytest.raises(Incomplete, match=LOST):
        open_deepspeed(emptied(name, tmp_path, *changes))


@pytest.mark.parametrize("name", ["zero2-bf16-3", "zero3-groups-2"])
def test_states_of_which_only_the_steps_are_left_are_lost(name, tmp_path):
    folder, _ = unpack(name, tmp_path)

    def strip(tree: Any) -> None:
        for state in base_of(tree)["state"].values():
            del state["exp_avg"], state["exp_avg_sq"]

    for path in folder.glob("global_step2/*optim_states.pt"):
        rewrite(path, strip)
    for path in folder.glob("global_step2/*model_states.pt"):
        rewrite(path, counted(global_steps=0))
    with pytest.raises(Incomplete, match=LOST):
        open_deepspeed(Place(str(folder)))


@pytest.mark.parametrize("name", ["zero2-bf16-3", "zero3-groups-2"])
@pytest.mark.parametrize(
    "changes",
    [
        (grouped("betas", momentum=0),),
        (grouped("betas"),),
        (counted(global_steps=0),),
        (counted(global_steps=2, skipped_steps=2),),
    ],
)
def test_files_that_need_hold_no_states_are_read_with_a_note(name, changes, tmp_path):
    """SGD without momentum keeps none; nor does any optimizer before its first step."""
    opened = open_deepspeed(emptied(name, tmp_path, *changes))
    assert {one.name.split(".")[1] for one in opened.tensors if one.name.startswith("optimizer.")} == {
        "master"
    }
    assert NONE in " ".join(opened.about.notes)


def test_the_momentum_of_sgd_that_has_none_is_no_state(tmp_path):
    """Torch used to keep None."""

    def keep_none(tree: Any) -> None:
        if "optimizer_state_dict" in tree:
            base_of(tree)["state"].update({0: {"momentum_buffer": None}, 1: {"momentum_buffer": None}})

    opened = open_deepspeed(emptied("zero1-bf16-2", tmp_path, grouped("betas", momentum=0), keep_none))
    assert NONE in " ".join(opened.about.notes)


@pytest.mark.parametrize(("kind", "is_lost"), [("AdamW", True), ("OneBitLamb", True), ("SGD", False)])
def test_the_config_says_which_optimizer_it_was_where_no_groups_are_there(kind, is_lost, tmp_path):
    """Elastic checkpoints hold lists of states."""

    def elastic(tree: Any) -> None:
        if "optimizer_state_dict" in tree:
            tree["optimizer_state_dict"]["base_optimizer_state"] = []
        tree["ds_config"]["optimizer"] = {"type": kind}

    folder, _ = unpack("zero1-bf16-2", tmp_path)
    for path in folder.glob("global_step2/*_states.pt"):
        rewrite(path, elastic)
    if is_lost:
        with pytest.raises(Incomplete, match=f"{LOST[:50]}.*{kind}, which keeps moments"):
            open_deepspeed(Place(str(folder / "global_step2")))
    else:
        assert NONE in " ".join(open_deepspeed(Place(str(folder / "global_step2"))).about.notes)


def without_moments(folder: Path, pattern: str) -> Place:
    for moment in ("exp_avg", "exp_avg_sq"):
        for path in folder.glob(f"*_universal/zero/{pattern}/{moment}.pt"):
            path.unlink()
    return Place(str(folder))


@pytest.mark.parametrize("name", ["zero1-bf16-2", "zero3-bf16-3"])
def test_universal_folders_that_lost_the_states_are_refused(name, tmp_path):
    """Issue 6691: the conversion of ZeRO-3 succeeded."""
    folder, _ = unpack(name, tmp_path)
    with pytest.raises(Incomplete, match=LOST):
        open_deepspeed_universal(without_moments(folder, "*"))
    for path in folder.glob("*_universal/*model_states.pt"):
        rewrite(path, counted(global_steps=0))
    rewrite(next(folder.glob("*_universal/zero/optimizer_state.pt")), without_steps)
    assert NONE in " ".join(open_deepspeed_universal(Place(str(folder))).about.notes)


def without_steps(tree: Any) -> None:
    tree.pop("optimizer_state_dict", None)


def test_universal_folders_of_which_one_lost_its_states_are_refused(tmp_path):
    folder, _ = unpack("zero1-bf16-2", tmp_path)
    with pytest.raises(Incomplete, match=r"has no states of 'up.bias' but its master, and others have"):
        open_deepspeed_universal(without_moments(folder, "up.bias"))


def test_universal_folders_of_deepspeed_tell_the_options_of_the_groups(tmp_path):
    folder, _ = unpack("zero1-bf16-2", tmp_path)
    groups = open_deepspeed_universal(Place(str(folder))).about.extra["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["betas"], group["params"][0]) for group in groups] == [
        (0.1, (0.9, 0.999), "embed.weight"),
        (0.0, (0.9, 0.999), "up.bias"),
    ]


# ------------------------------------------------------------------------------------------ where they lie


def spread_out(trees: list[Any], group: int, paddings: list[int]) -> None:
    """Lay a group's parameters apart in the partitions of all ranks."""
    zeros = [tree["optimizer_state_dict"] for tree in trees]
    numels = [66, 78, 78] if group == 0 else [13, 13, 13]
    holders: list[tuple[Any, Any]] = [(zero["single_partition_of_fp32_groups"], group) for zero in zeros]
    for key in (None, "exp_avg", "exp_avg_sq"):
        if key is not None:
            holders = [(zero["base_optimizer_state"]["state"][group], key) for zero in zeros]
        flat = torch.cat([table[place] for table, place in holders])[: sum(numels)]
        pieces = []
        for piece, count in zip(flat.split(numels), paddings, strict=True):
            pieces += [piece, torch.full((count,), 7.0)]
        for (table, place), part in zip(holders, torch.cat(pieces).chunk(len(zeros)), strict=True):
            table[place] = part.clone()


@pytest.mark.parametrize("paddings", [[[2, 0, 4], [3, 1, 1]], [[0, 0, 0], [0, 0, 0]], [[1, 9, 0], [0, 5, 0]]])
def test_parameters_that_are_aligned_each_lie_behind_the_padding_of_those_before(paddings, tmp_path):
    """Files of engines that say no `param_slice_mappings`: sizes and order alone say where parameters are."""
    folder, golden = unpack("zero1-bf16-2", tmp_path)
    paths = sorted(folder.glob("global_step2/*optim_states.pt"))
    with stand_ins():
        trees = [torch.load(path, weights_only=False) for path in paths]
        for group, after in enumerate(paddings):
            spread_out(trees, group, after)
        for path, tree in zip(paths, trees, strict=True):
            del tree["optimizer_state_dict"]["param_slice_mappings"]
            tree["optimizer_state_dict"]["param_alignment_paddings"] = paddings
            torch.save(tree, path)
    opened = open_deepspeed(Place(str(folder / "global_step2")))
    for name, expected in golden.items():
        assert (values_of(opened, name) == expected).all(), name


def parts_of_a_rank(world: int) -> dict[str, int]:
    return {name: -(-int(np.prod(shape)) // world) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("limit", [33, 34, 72, 73, 111, 112, 1])
def test_sub_groups_end_where_a_rank_s_parts_reach_deepspeed_s_limit_exactly(limit, tmp_path):
    """DeepSpeed ends one with the parameter that reaches `sub_group_size`: 33, 72 and 111 are reached."""
    folder, _ = unpack("zero3-groups-2", tmp_path)
    config = {"zero_optimization": {"sub_group_size": limit}}
    contents = Relaid(open_deepspeed(Place(str(folder))), dp_world_size=2, zero_stage=3, ds_config=config)
    with drafting(str(tmp_path / "written"), "one") as draft:
        write_deepspeed(draft, contents, 1 << 16)
    opened = open_deepspeed(Place(str(tmp_path / "written")))
    numels = parts_of_a_rank(2)
    expected: list[list[str]] = []
    for names in (["embed.weight", "up.weight", "down.weight"], ["up.bias", "norm.weight", "norm.bias"]):
        held: list[str] = []
        for name in names:
            held.append(name)
            if sum(numels[each] for each in held) >= limit or name == names[-1]:
                expected.append(held)
                held = []
    assert [list(members) for members in opened.about.extra["param_shapes"]] == expected


# ------------------------------------------------------------------------------- masters and their weights


@pytest.mark.parametrize(("shape", "place"), [((5000,), -1), ((70, 60), -1), ((5000,), 0), ((70, 60), 3)])
def test_a_master_is_held_against_its_weight_at_its_beginning_and_at_its_end(shape, place):
    masters = np.random.default_rng(0).normal(size=shape).astype(np.float32).view(np.uint32)
    weights = round_bits(masters, "bfloat16")

    def read(bits: np.ndarray) -> Callable[[Box], np.ndarray]:
        return lambda box: bits[box.within(Box.whole(shape))]

    weight = Foreign("w", "bfloat16", shape)
    assert is_rounded(read(masters), read(weights), weight)
    weights.reshape(-1)[place] ^= 1
    assert not is_rounded(read(masters), read(weights), weight)


@pytest.mark.parametrize("wrong", range(4))
def test_a_part_of_a_master_is_looked_at_where_it_lies(wrong):
    masters = np.random.default_rng(0).normal(size=(4000,)).astype(np.float32).view(np.uint32)
    weights = round_bits(masters, "bfloat16")
    weights[1000 * wrong + 500] ^= 1  # in the middle of one of four parts, each smaller than a sample

    def read(bits: np.ndarray) -> Callable[[Box], np.ndarray]:
        return lambda box: bits[box.within(Box.whole((4000,)))]

    weight = Foreign("w", "bfloat16", (4000,))
    told = [is_rounded(read(masters), read(weights), weight, Box((1000 * n,), (1000,))) for n in range(4)]
    assert told == [n != wrong for n in range(4)]
