"""The registry of formats: what a directory is taken for, and that every writer is where it is said to be."""

import subprocess
import sys

import pytest
import torch

from checkpoint.errors import Unsupported
from checkpoint.interop.drafts import drafting
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


@pytest.mark.parametrize("format", list(FILES))
def test_a_directory_is_taken_for_what_its_files_are_called(format, tmp_path):
    for name in FILES[format]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
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
