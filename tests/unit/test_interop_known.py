"""The registry of formats: what a directory is taken for, and that every writer is where it is said to be."""

import subprocess
import sys

import pytest
import torch

from checkpoint.errors import Unsupported
from checkpoint.interop.drafting import drafting
from checkpoint.interop.formats.known import FORMATS, detect, write_foreign
from checkpoint.interop.place import Place
from tests.foreign_samples import Given

FILES = {
    "megatron": ["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"],
    "deepspeed": [
        "latest",
        "global_step2/mp_rank_00_model_states.pt",
        "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
    "dcp": [".metadata", "__0_0.distcp", "config.json"],
    "hf": ["config.json", "model.safetensors", "pytorch_model.bin"],
    "torch": ["checkpoint.pt", "readme.md"],
}


def make(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("format", list(FILES))
def test_a_directory_is_taken_for_what_its_files_are_called(format, tmp_path):
    texts = {"latest": "global_step2", "latest_checkpointed_iteration.txt": "10"}
    make(tmp_path, {name: texts.get(name, "x") for name in FILES[format]})
    assert detect(Place(str(tmp_path))).name == format


@pytest.mark.parametrize(
    ("universal", "latest", "format"),
    [
        ("global_step2_universal", "global_step2", "deepspeed-universal"),
        ("global_step2_universal", "global_step10", "deepspeed"),
        ("global_step10_universal", "global_step2", "deepspeed-universal"),
        ("best", "global_step10", "deepspeed-universal"),
    ],
)
def test_universal_folders_that_training_has_left_behind_are_not_taken_for_the_newest(
    universal, latest, format, tmp_path
):
    names = [f"{universal}/zero/w/fp32.pt", f"{latest}/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    make(tmp_path, {"latest": latest, "latest_universal": universal, **dict.fromkeys(names, "x")})
    assert detect(Place(str(tmp_path))).name == format
    (tmp_path / names[1]).unlink()
    assert detect(Place(str(tmp_path))).name == "deepspeed-universal"


@pytest.mark.parametrize(
    ("step", "format"), [("10", "megatron"), ("20", "megatron-dist"), ("30", "megatron")]
)
def test_a_run_that_went_over_to_torch_dist_is_what_its_tracker_names(step, format, tmp_path):
    names = ["iter_0000010/mp_rank_00/model_optim_rng.pt", "iter_0000020/common.pt"]
    names += ["iter_0000020/metadata.json", "iter_0000020/.metadata"]
    make(tmp_path, {"latest_checkpointed_iteration.txt": step, **dict.fromkeys(names, "x")})
    assert detect(Place(str(tmp_path))).name == format


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_is_written_or_says_what_it_cannot_say(format, tmp_path):
    known = FORMATS[format]
    assert known.name == format and known.about
    try:
        with drafting(str(tmp_path / "out"), "a1") as draft:
            write_foreign(format, draft, Given({"w": torch.ones(2)}), 1 << 20)
    except Unsupported as unsupported:
        said = str(unsupported)
    else:
        said = detect(Place(str(tmp_path / "out"))).name
    assert said


def test_reading_needs_no_torch():
    script = "import sys, checkpoint.interop.formats.known; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
