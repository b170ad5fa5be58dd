"""Random states, through every format and back: the same names, dtypes, shapes, bits and plain data."""

import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.engine.tensors import dtype_name, torch_dtype
from checkpoint.errors import CheckpointError
from checkpoint.format.box import Box
from checkpoint.format.dtypes import DTYPES
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.inert import load_inert, plain
from checkpoint.interop.formats.known import open_foreign
from checkpoint.interop.formats.nesting import nest
from checkpoint.interop.formats.optimizer_dicts import Keys
from tests.foreign_samples import Given, check_same, contents_of, rewritten, some_boxes

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

NOT_IN_SAFETENSORS = {"complex32", "complex128"}
words = st.text("abcdefgh", min_size=1, max_size=4)
names = st.lists(words, min_size=1, max_size=3).map(".".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
data = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3) | st.tuples(inner),
    max_leaves=8,
)


def tensor(dtype: str, shape: list[int], seed: int) -> torch.Tensor:
    """Return random bits, often of one value, in one of several memory layouts."""
    numel = int(np.prod(shape, dtype=np.int64))
    bits = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, 16 * numel + 16, np.uint8)
    found = torch.from_numpy(bits[: numel * DTYPES[dtype].itemsize]).view(torch_dtype(dtype)).reshape(shape)
    return found.t().contiguous().t() if len(shape) == 2 and seed % 2 else found


tensors = st.builds(
    tensor, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 1000)
)


@st.composite
def states(draw: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors by the contract's names, and plain data: a model, perhaps an optimizer and others."""
    model = {
        name: one
        for name, one in draw(st.dictionaries(names, tensors, min_size=1, max_size=5)).items()
        if not name.startswith(("optimizer.", "other."))
    }
    found = dict(model)
    extra: dict[str, Any] = {"epoch": draw(st.integers(0, 9)), "notes": draw(data)}
    if draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from(["exp_avg", "exp_avg_sq", "step"]), min_size=1, unique=True))
        for name in model:
            found |= {f"optimizer.{kind}.{name}": draw(tensors) for kind in kinds}
        extra["optimizer"] = {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.5), "params": list(model)}]}
    if draw(st.booleans()):
        found |= {
            f"other.rng.{key}": one for key, one in draw(st.dictionaries(words, tensors, max_size=2)).items()
        }
    return found, extra


@pytest.mark.slow
@settings(max_examples=60)
@given(state=states(), format=st.sampled_from(["dcp", "torch"]))
def test_a_state_comes_back_from_a_training_format_as_it_was(state, format):
    found, extra = state
    with tempfile.TemporaryDirectory() as folder:
        copy = rewritten(Given(found, About("given", extra=extra)), format, Path(folder) / "out")
        check_same(contents_of(copy), found)
        kept = {key: item for key, item in copy.about.extra.items() if key != "containers"}
        # A container that holds nothing leaves no trace in flat names.
        assert kept.get("epoch") == extra["epoch"] and kept.get("optimizer") == extra.get("optimizer")
        for number, one in enumerate(copy.tensors):
            for box in some_boxes(one.shape, number):
                whole = copy.read(number, Box.whole(one.shape))
                assert np.array_equal(copy.read(number, box), whole[box.within(Box.whole(one.shape))])


@settings(max_examples=40)
@given(model=st.dictionaries(names, tensors, max_size=6), max_shard_bytes=st.integers(1, 2000))
def test_a_model_comes_back_from_safetensors_as_it_was(model, max_shard_bytes):
    model = {
        name: one
        for name, one in model.items()
        if dtype_name(one.dtype) not in NOT_IN_SAFETENSORS
        and (one.shape or dtype_name(one.dtype) != "float4_e2m1fn_x2")
        and not name.startswith(("optimizer.", "other."))
    }
    with tempfile.TemporaryDirectory() as folder:
        about = About("given", extra={"max_shard_bytes": max_shard_bytes})
        check_same(contents_of(rewritten(Given(model, about), "hf", Path(folder) / "out")), model)


@settings(max_examples=60)
@given(value=data, protocol=st.sampled_from([2, 4, 5]))
def test_plain_data_are_read_from_pickles_as_pickle_reads_them(value, protocol):
    assert plain(load_inert(pickle.dumps(value, protocol), "x", {}, print), "x") == value


@pytest.mark.slow
@settings(max_examples=100)
@given(
    state=states(), format=st.sampled_from(["dcp", "torch"]), where=st.floats(0, 1), what=st.integers(0, 255)
)
def test_a_changed_byte_is_an_error_of_ours_or_changes_a_value_and_nothing_else(state, format, where, what):
    found, extra = state
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        rewritten(Given(found, About("given", extra=extra)), format, path)
        files = sorted(each for each in path.iterdir() if each.stat().st_size)
        victim = files[what % len(files)]
        content = bytearray(victim.read_bytes())
        content[int(where * (len(content) - 1))] = what
        victim.write_bytes(content)
        with suppress(CheckpointError):
            copy = open_foreign(str(path))
            for number, one in enumerate(copy.tensors):
                assert copy.read(number, Box.whole(one.shape)).shape == one.shape


def test_what_is_nested_for_names_and_for_numbers_differs_in_keys_alone():
    about = About("given", extra={"optimizer": {"param_groups": [{"params": ["b", "a"]}]}})
    given_ = Given({"a": torch.ones(1), "b": torch.ones(2), "optimizer.step.a": torch.ones(())}, about)
    named, numbered = (nest(given_, keys)["optimizer"] for keys in (Keys.NAMES, Keys.NUMBERS))
    assert list(named["state"]) == ["a"] and list(numbered["state"]) == [1]
    assert numbered["param_groups"][0]["params"] == [0, 1]
    assert numbered["param_groups"][0]["param_names"] == named["param_groups"][0]["params"] == ["b", "a"]
