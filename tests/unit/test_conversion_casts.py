"""Casts: rounded once, and never to infinity without a word."""

import json

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint.errors import Misuse
from checkpoint.interop.conversion.casting import cast, reference_cast
from checkpoint.interop.conversion.contract import ConversionSettings, Overflow
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of, save_state
from tests.unit.test_cli_conversions import ask, told

TIE = 1 + 2.0**-8  # halfway between two neighbours of bfloat16
DOUBLES = [
    TIE,
    TIE + 2.0**-40,
    TIE - 2.0**-40,
    1 + 2.0**-11 + 2.0**-40,
    -TIE - 2.0**-45,
    1e-310,
    -1e-45,
    3.4e38,
]


@pytest.mark.parametrize(("new", "num_bits"), [("bfloat16", 8), ("float16", 11)])
def test_a_double_is_rounded_once(new, num_bits):
    """By way of float32 a value just beside a tie would first become the tie, and then go the wrong way."""
    generator = np.random.default_rng(0)
    halves = 1 + (2 * generator.integers(0, 1 << (num_bits - 1), 200) + 1) * 2.0**-num_bits
    values = np.concatenate([DOUBLES, halves + 2.0**-45, halves - 2.0**-45, halves, -halves - 2.0**-45])
    bits = values.view("<u8")
    made = cast(bits, "float64", new)
    assert np.array_equal(made, reference_cast(bits, "float64", new))
    back = torch.from_numpy(made.view("i2")).view(getattr(torch, new)).double().numpy()
    near = np.abs(values) < 3e4
    quantum = 2.0 ** (1 - num_bits)
    exact = np.rint(values / quantum) * quantum  # those from 1 to 2
    ones = near & (np.abs(values) >= 1)
    assert np.array_equal(back[ones], exact[ones])


def test_a_cast_to_infinity_is_refused_with_the_tensor_and_the_number_unless_it_is_allowed():
    source, target = MemoryStore("source"), MemoryStore("target")
    save_state(source, {"model": {"w": torch.tensor([1.0, 7e4, -1e9, float("inf")]), "b": torch.ones(2)}})
    with pytest.raises(Misuse, match=r"2 elements of model/w are beyond float16.*--allow-overflow"):
        reshard(source, target, Change(dtype="fp16"))
    assert not checkpoint.Catalog(target).steps()
    settings = ConversionSettings(overflow=Overflow.ALLOWED)
    report = reshard(source, target, Change(dtype="fp16"), settings=settings)
    assert report.notes == ("2 elements of model/w are beyond float16, and became infinite",)
    assert bits_of(target)["model/w"][0] == torch.float16
    again = reshard(source, target, Change(dtype="fp16"), settings=settings)
    assert not again.is_new and again.notes == report.notes
    with pytest.raises(Misuse, match="2 elements of model/w"):
        reshard(source, target, Change(dtype="fp16"))
    other = MemoryStore("other")
    assert reshard(source, other, Change(dtype="bf16")).notes == ()


def test_an_export_to_infinity_is_refused_and_never_appears(tmp_path):
    url, out = str(tmp_path / "store"), tmp_path / "out"
    save_state(checkpoint.open_store(url), {"model": {"w": torch.tensor([1.0, 7e4])}})
    with pytest.raises(Misuse, match="1 elements of model/w are beyond float16"):
        export_foreign(Whereabouts(url), str(out), Emigration("hf", dtype="fp16"))
    assert not out.exists()
    command = ("export", url, str(out), "--format", "hf", "--dtype", "fp16")
    assert ask(*command).exit_code == 2
    assert "became infinite" in told(*command, "--allow-overflow")["notes"][0]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_configuration_tells_the_type_that_weights_were_cast_to(tmp_path, key):
    url, out = str(tmp_path / "store"), tmp_path / "out"

    def retyped(dtype: str) -> dict[str, object]:
        return {**config, key: dtype, "text_config": {key: dtype}}

    inner = {"quantization_config": {key: "int8"}, "text_config": {key: "float32"}}
    config = {"model_type": "other", key: "float32", **inner}
    save_state(checkpoint.open_store(url), {"model": {"w": torch.ones(3)}, "config": config})
    told("export", url, str(out), "--format", "hf", "--dtype", "bf16")
    assert json.loads((out / "config.json").read_text()) == retyped("bfloat16")
    told("reshard", url, str(tmp_path / "cast"), "--dtype", "fp16")
    told("export", str(tmp_path / "cast"), str(tmp_path / "half"), "--format", "hf")
    assert json.loads((tmp_path / "half/config.json").read_text()) == retyped("float16")
    told("export", url, str(tmp_path / "same"), "--format", "hf")
    assert json.loads((tmp_path / "same/config.json").read_text()) == config
