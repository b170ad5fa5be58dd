"""Checkpoints with Megatron-Core's own names, shapes and parts, read by the built-in rules.

Golden tensors are put together as Megatron-Core's sharded_state_dict says, by the script that made them.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.errors import CheckpointError, Corrupt, Incomplete, Mismatch, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.conversion.ruled import choose_rules
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.contract import ForeignCheckpoint
from checkpoint.interop.formats.megatron import looks_like_megatron, open_megatron
from checkpoint.interop.formats.megatron_writing import write_megatron
from checkpoint.interop.formats.rounding import round_bits
from checkpoint.interop.moves import Plan
from checkpoint.interop.place import Place
from checkpoint.interop.rules import plan_import
from tests.interop.megatron_expected import RULES, expected
from tests.interop.unpacking import rewrite, unpack
from tests.interop_samples import assemble, check_equal, fingerprints, proved

PYTHON = Path(__file__).resolve().parents[2] / ".venv-deepspeed/bin/python"
LOCAL_SPEC = ["padded_vocab=32", "fused_norms=0"]  # the names of models that need no Transformer Engine
AXES = {
    "llama": {"tensor": 2, "pipeline": 2},
    "gpt": {"tensor": 2, "pipeline": 2},
    "moe": {"tensor": 1, "pipeline": 2, "expert": 2},
}


def plan_of(kind: str, opened: ForeignCheckpoint) -> Plan:
    rules = builtin_rules(RULES[kind])
    sizes = {name: size for name, size in opened.about.sizes.items() if name in rules.sizes}
    return plan_import(rules, sizes, opened.about.axes, opened.tensors)


def marks_of(kind: str, opened: ForeignCheckpoint) -> dict[str, int]:
    rules = builtin_rules(RULES[kind])
    sizes = {name: size for name, size in opened.about.sizes.items() if name in rules.sizes}
    return proved(rules, sizes, opened.about.axes, opened.tensors, reading(opened))


def reading(opened: ForeignCheckpoint) -> Callable[[int], np.ndarray]:
    return lambda number: opened.read(number, Box.whole(opened.tensors[number].shape))


@pytest.mark.parametrize("made", [*RULES, "virtual-llama", "virtual-gpt"])
def test_the_built_in_rules_read_what_megatron_core_itself_makes_of_a_model(made, tmp_path):
    folder, golden = unpack(f"megatron-{made}", tmp_path)
    kind = made.split("-")[-1]
    assert looks_like_megatron(Place(str(folder)).files)
    opened = open_megatron(Place(str(folder)))
    assert opened.about.axes == (AXES[kind] if made == kind else {"tensor": 1, "pipeline": 2})
    assert opened.about.step == 7
    plan = plan_of(kind, opened)
    read = reading(opened)
    found = assemble(plan, [read(number) for number in range(len(plan.foreign))])
    weights = expected(kind, golden, "")
    steps = {f"optimizer/step/{name}" for name in weights}
    states = {
        f"optimizer/{state}/{name}": bits.view(np.uint32)
        for state in ("exp_avg", "exp_avg_sq", "master")
        for name, bits in expected(kind, golden, f"{state}:").items()
    }
    assert found.keys() == weights.keys() | states.keys() | steps
    for name, bits in weights.items():
        assert (found[name] == round_bits(bits.view(np.uint32), "bfloat16")).all(), name
    for name, bits in states.items():
        assert (found[name] == bits).all(), name
    assert {float(found[name].view(np.float32)[()]) for name in steps} == {7.0}
    sums = marks_of(kind, opened)
    plain = fingerprints({name: found[name] for name in states})
    assert {name: sums[name] for name in states} == plain


@pytest.mark.parametrize("kind", RULES)
def test_weights_that_are_written_come_back_bit_by_bit(kind, tmp_path):
    folder, _ = unpack(f"megatron-{kind}", tmp_path)
    opened = open_megatron(Place(str(folder)))
    kept = [n for n, tensor in enumerate(opened.tensors) if not tensor.name.startswith("optimizer.")]

    class Weights:
        about = opened.about
        tensors = tuple(opened.tensors[number] for number in kept)

        def read(self, number: int, box: Box) -> np.ndarray:
            return opened.read(kept[number], box)

    with drafting(str(tmp_path / "back"), "one") as draft:
        write_megatron(draft, Weights(), 1 << 16)
    back = open_megatron(Place(str(tmp_path / "back")))
    assert back.about.axes == opened.about.axes
    assert back.about.sizes == opened.about.sizes
    check_equal(
        marks_of(kind, back),
        {name: value for name, value in marks_of(kind, opened).items() if not name.startswith("optimizer/")},
    )
    with (
        pytest.raises(Unsupported, match="numbers its optimizer's states by an order"),
        drafting(str(tmp_path / "all"), "one") as draft,
    ):
        write_megatron(draft, opened, 1 << 16)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not PYTHON.exists(), reason="needs Megatron-Core: see tests/interop/deepspeed.txt")
@pytest.mark.parametrize(
    ("kind", "to"),
    [("llama", "tensor=2"), ("gpt", "pipeline=2,tensor=2"), ("moe", "expert=2,tensor=1")],
)
def test_megatron_s_models_load_the_files_of_other_ranks_that_are_written(kind, to, tmp_path):
    folder, _ = unpack(f"megatron-{kind}", tmp_path / "made")
    choice, out = choose_rules(RULES[kind]), str(tmp_path / "out")
    source, padded = Whereabouts(str(folder), rules=choice), choose_rules(RULES[kind], LOCAL_SPEC)
    export_foreign(source, out, Emigration("megatron", to, padded, only="model/*"))
    spread = [f"--{part}" for part in to.split(",")]
    command = [str(PYTHON), "-m", "tests.interop.megatron_load", f"{out}/iter_0000007", "--kind", kind]
    done = subprocess.run(
        [*command, *spread],
        cwd=PYTHON.parents[2],
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_experts_of_several_ranks_are_written_for_one(tmp_path):
    """Its arguments speak of the ranks that the files are for, not of the source's."""
    folder, _ = unpack("megatron-moe", tmp_path)
    opened = open_megatron(Place(str(folder)))
    kept = [
        n for n, one in enumerate(opened.tensors) if one.name.startswith("embedding") and not one.at["expert"]
    ]

    class One:
        about = replace(opened.about, axes={"tensor": 1, "pipeline": 1})
        tensors = tuple(replace(opened.tensors[number], at={}) for number in kept)

        def read(self, number: int, box: Box) -> np.ndarray:
            return opened.read(kept[number], box)

    with drafting(str(tmp_path / "back"), "one") as draft:
        write_megatron(draft, One(), 1 << 16)
    assert open_megatron(Place(str(tmp_path / "back"))).about.axes == {"tensor": 1, "pipeline": 1}


# ------------------------------------------------------------------- missing, doubled, stale, and other bugs


def made(tmp_path: Path) -> Path:
    folder, _ = unpack("megatron-llama", tmp_path)
    return folder / "iter_0000007"


def refuses(folder: Path, error: type[CheckpointError], match: str) -> None:
    with pytest.raises(error, match=match):
        open_megatron(Place(str(folder)))


def test_a_rank_that_is_missing_is_named(tmp_path):
    folder = made(tmp_path)
    shutil.rmtree(folder / "mp_rank_01_001")
    refuses(folder, Incomplete, "no file of {'tensor': 1, 'pipeline': 1}, one of")


def test_a_rank_that_is_left_from_another_world_is_named(tmp_path):
    folder = made(tmp_path)
    shutil.copytree(folder / "mp_rank_00_001", folder / "mp_rank_02_001")
    refuses(folder, Corrupt, "mp_rank_02_001/model_optim_rng.pt .* of none of the")


@pytest.mark.parametrize(
    ("one", "two"), [("mp_rank_00_000", "mp_rank_01_000"), ("mp_rank_01_001", "mp_rank_00_001")]
)
def test_a_rank_s_file_that_is_a_copy_of_another_s_is_caught(one, two, tmp_path):
    folder = made(tmp_path)
    shutil.copy(folder / one / "model_optim_rng.pt", folder / two / "model_optim_rng.pt")
    refuses(folder, Corrupt, "hold the same: one is a copy of the other")


def test_a_rank_s_file_of_another_iteration_or_run_is_caught(tmp_path):
    folder = made(tmp_path)
    path = folder / "mp_rank_01_000/model_optim_rng.pt"

    def restart(tree: Any) -> None:
        tree["args"].num_layers = 6

    rewrite(path, restart)
    refuses(folder, Corrupt, "mp_rank_01_000/.* is of a run with .*'num_layers': 6")

    def advance(tree: Any) -> None:
        tree["iteration"] = 8

    rewrite(path, advance)
    refuses(folder, Corrupt, "mp_rank_01_000/.* is of iteration 8, and .* of 7")


def test_ranks_that_change_places_are_caught(tmp_path):
    """Every shape, count and norm agrees; the content of what they share out does not."""
    folder = made(tmp_path)
    opened = open_megatron(Place(str(folder)))
    sound = marks_of("llama", opened)
    shutil.move(folder / "mp_rank_00_000", folder / "kept")
    shutil.move(folder / "mp_rank_01_000", folder / "mp_rank_00_000")
    shutil.move(folder / "kept", folder / "mp_rank_01_000")
    wrong = open_megatron(Place(str(folder)))
    with pytest.raises(Mismatch, match=r"the content of \d+ of 195 tensors differs"):
        check_equal(sound, marks_of("llama", wrong))


def test_an_optimizer_of_other_shapes_than_the_model_is_caught(tmp_path):
    folder = made(tmp_path)

    def forget(tree: Any) -> None:
        tree["optimizer"]["optimizer"]["param_groups"][0]["params"].pop()

    rewrite(folder / "mp_rank_01_000/model_optim_rng.pt", forget)
    refuses(folder, CheckpointError, "mp_rank_01_000")


def test_states_that_the_optimizer_lost_are_caught_by_the_rules(tmp_path):
    """PyTorch issue 140898, in one rank's file."""
    folder = made(tmp_path)
    path = folder / "mp_rank_01_000/model_optim_rng.pt"
    rewrite(path, lambda tree: tree["optimizer"]["optimizer"]["state"].clear())
    opened = open_megatron(Place(str(folder)))
    with pytest.raises(Incomplete, match=r"optimizer/.*tensor"):
        plan_of("llama", opened)


def test_virtual_stages_that_are_missing_copied_or_uneven_are_refused_by_name(tmp_path):
    folder = unpack("megatron-virtual-llama", tmp_path)[0] / "iter_0000007"
    path = folder / "mp_rank_00_001/model_optim_rng.pt"
    kept = path.read_bytes()

    def copied(tree: Any) -> None:
        tree["model0"] |= layers_of(tree["model1"])

    for change, error, match in (
        (lambda tree: tree.pop("model0"), Corrupt, r"00_001/.* holds no model .* or not all its chunks"),
        (lambda tree: tree.pop("model1"), Corrupt, r"00_001/.* has 1 parts of the model, and .* 2"),
        (copied, Corrupt, r"'0/decoder.* is not what .* was rounded from|layers.* was rounded from"),
        (grown, Unsupported, r"virtual pipeline stages of \[1, 2\] layers, and only equal ones"),
    ):
        path.write_bytes(kept)
        rewrite(path, change)
        refuses(folder, error, match)


def grown(tree: Any) -> None:
    """Give a chunk a layer more."""
    more = layers_of(tree["model0"])
    tree["model0"] |= {name.replace("layers.0.", "layers.1."): one for name, one in more.items()}


def layers_of(chunk: Any) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in chunk.items() if "layers.0." in name and one is not None}


def test_virtual_stages_that_change_places_are_caught_by_the_masters(tmp_path):
    folder = unpack("megatron-virtual-llama", tmp_path)[0] / "iter_0000007"

    def swap(tree: Any) -> None:
        tree["model0"], tree["model1"] = tree["model1"], tree["model0"]

    rewrite(folder / "mp_rank_00_000/model_optim_rng.pt", swap)
    refuses(folder, CheckpointError, "mp_rank_00_000|is not what .* was rounded from")


def test_files_that_are_no_model_are_refused_by_name(tmp_path):
    folder = made(tmp_path)
    (folder / "mp_rank_00_000/model_optim_rng.pt").write_bytes(b"PK\3\4 and so on")
    refuses(folder, Corrupt, "mp_rank_00_000/model_optim_rng.pt")


# ------------------------------------------------------------------------- the distributed optimizer's files


def buffers_of(kind: str, tmp_path: Path) -> Path:
    return unpack(f"megatron-buffers-{kind}", tmp_path)[0]


@pytest.mark.parametrize("made", [*RULES, "virtual-gpt"])
def test_a_distributed_optimizer_s_masters_moments_and_step_are_what_megatron_was_given(made, tmp_path):
    folder, golden = unpack(f"megatron-buffers-{made}", tmp_path)
    kind = made.split("-")[-1]
    opened = open_megatron(Place(str(folder)))
    plan = plan_of(kind, opened)
    read = reading(opened)
    found = assemble(plan, [read(number) for number in range(len(plan.foreign))])
    weights = expected(kind, golden, "master:")
    for state in ("exp_avg", "exp_avg_sq", "master"):
        for name, bits in expected(kind, golden, f"{state}:").items():
            assert (found.pop(f"optimizer/{state}/{name}") == bits.view(np.uint32)).all(), name
    assert {found.pop(f"optimizer/step/{name}").view(np.float32)[()] for name in weights} == {7.0}
    for name, bits in weights.items():
        assert (found.pop(name) == round_bits(bits.view(np.uint32), "bfloat16")).all(), name
    assert not found


def test_parameters_that_begin_a_bucket_are_found_by_their_masters(tmp_path):
    """Gaps before a parameter are those of its bucket, and no file says where one ends."""
    folder = buffers_of("llama", tmp_path)
    opened = open_megatron(Place(str(folder)))
    sound = {
        (tensor.name, *tensor.at.items()): reading(opened)(number)
        for number, tensor in enumerate(opened.tensors)
    }

    def close_a_gap(tree: Any) -> None:
        for table in tree[0].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):  # 128 elements, then the 8 of a norm, then a gap
                table[key] = torch.cat([table[key][:136], table[key][192:]])

    for rank in ("mp_rank_00", "mp_rank_01"):
        rewrite(folder / f"iter_0000007/{rank}/distrib_optim.pt", close_a_gap)
    found = open_megatron(Place(str(folder)))
    assert len(found.tensors) == len(sound)
    for number, tensor in enumerate(found.tensors):
        assert (reading(found)(number) == sound[tensor.name, *tensor.at.items()]).all(), tensor.name


def test_two_parameters_of_one_shape_that_change_places_in_a_buffer_are_caught(tmp_path):
    """Another order of the model's parameters: every shape, sum and norm is the same."""
    folder = buffers_of("llama", tmp_path) / "iter_0000007"

    def swap(tree: Any) -> None:
        for table in tree[0].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                one, other = table[key][192:240].clone(), table[key][640:688].clone()
                table[key][192:240], table[key][640:688] = other, one

    rewrite(folder / "mp_rank_00/distrib_optim.pt", swap)
    refuses(folder, Corrupt, "mp_rank_00/distrib_optim.pt does not hold the master of")


def test_buffers_that_are_missing_cut_another_rank_s_or_of_an_older_layout_are_refused(tmp_path):
    folder = buffers_of("llama", tmp_path) / "iter_0000007"
    one, other = (folder / f"{rank}/distrib_optim.pt" for rank in ("mp_rank_00", "mp_rank_01"))
    kept = one.read_bytes()
    shutil.copy(other, one)
    refuses(folder, Corrupt, "mp_rank_00/distrib_optim.pt does not hold the master of")
    one.write_bytes(kept[:-100])
    refuses(folder, Corrupt, "mp_rank_00/distrib_optim.pt")
    one.unlink()
    refuses(folder, Incomplete, "mp_rank_00/distrib_optim.pt is missing")
    one.write_bytes(kept)
    rewrite(one, lambda tree: tree.pop("buckets_coalesced"))
    refuses(folder, Unsupported, "mp_rank_00/distrib_optim.pt has its buffers in an older layout")
    one.write_bytes(kept)

    def shorten(tree: Any) -> None:
        for table in tree[0].values():
            table["exp_avg"] = table["exp_avg"][:-1]

    rewrite(one, shorten)
    refuses(folder, Corrupt, "has a buffer of states of the shapes")


def test_an_order_of_numbered_states_that_was_another_is_caught_by_the_masters(tmp_path):
    folder = made(tmp_path)

    def swap(tree: Any) -> None:
        masters = tree["optimizer"]["fp32_from_fp16_params"][1]
        masters[0], masters[1] = masters[1], masters[0]

    rewrite(folder / "mp_rank_01_000/model_optim_rng.pt", swap)
    refuses(folder, Corrupt, "is not what .* was rounded from")
