"""Modules of every kind of parallelism go on from a checkpoint of any other: the next losses are the same."""

import json
import subprocess
import sys

import pytest

from tests.integration.parallel_rank import LAYOUTS

SUMMED_OTHERWISE = {"tensor", "tensor-shards"}  # a row-parallel product is a sum of two
TOLERANCE = 2e-6


@pytest.mark.timeout(320)
@pytest.mark.parametrize(
    "distances",
    [pytest.param((1, 4), marks=pytest.mark.slow), pytest.param((2, 3, 5, 6), marks=pytest.mark.soak)],
    ids=["some", "others"],
)
def test_every_kind_of_parallel_module_goes_on_from_others_with_the_losses_of_the_whole(tmp_path, distances):
    (tmp_path / "keeper").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    names = list(LAYOUTS)
    first = ["whole:nothing:saved", *(f"{name}:whole:saved" for name in names[1:])]
    then = [
        f"{name}:{','.join(names[(number + far) % len(names)] for far in distances)}"
        for number, name in enumerate(names)
    ]
    command = [sys.executable, "-m", "tests.integration.parallel_rank", str(tmp_path), *first, *then]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    never_saved = json.loads((tmp_path / "whole-from-nothing-0.json").read_text())
    assert len(set(never_saved)) == len(never_saved), "every step has a batch, a mask and weights of its own"
    found = {one.name: json.loads(one.read_text()) for one in tmp_path.glob("*-from-*.json")}
    for name, layout in LAYOUTS.items():
        assert sum(one.startswith(f"{name}-from-") for one in found) >= layout.size * len(distances)
    for name, losses in found.items():
        if name.partition("-from-")[0] in SUMMED_OTHERWISE:
            assert losses == pytest.approx(never_saved, rel=TOLERANCE), name
        else:
            assert losses == never_saved, name
