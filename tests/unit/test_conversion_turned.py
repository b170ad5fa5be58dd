"""Exports whose tensors lie transposed in the files: a row there is a column here, and is not read alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from checkpoint import ConversionReport, ConversionSettings, Emigration, Whereabouts
from checkpoint.interop.conversion import outbound
from checkpoint.interop.conversion.ruled import choose_rules
from tests.conversion_samples import save_state

RULES = 'rules: 1\nname: turned\nmap:\n  - {from: "{n:w|v}", to: "{n}", transpose: [1, 0]}\n'


@pytest.fixture
def source(tmp_path) -> str:
    torch.manual_seed(2)
    url = str(tmp_path / "store")
    state = {"w": torch.randn(3000, 4100), "v": torch.randn(70, 50, dtype=torch.float64)}
    save_state(checkpoint.open_store(url), {"model": state})
    return url


def exported(
    source: str, tmp_path: Path, budget_bytes: int = 1 << 30
) -> tuple[ConversionReport, ConversionReport]:
    """Export with rules that transpose; return what was told before, and what was done."""
    (tmp_path / "rules.yaml").write_text(RULES)
    emigration = Emigration("hf", rules=choose_rules(str(tmp_path / "rules.yaml")))
    settings = ConversionSettings(budget_bytes)
    told, done = (
        act(Whereabouts(source), str(tmp_path / "out"), emigration, settings=settings)
        for act in (checkpoint.plan_export_foreign, checkpoint.export_foreign)
    )
    weights, written = (
        checkpoint.load(checkpoint.open_store(source)).state["model"],
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert all(torch.equal(written[name], weight.T) for name, weight in weights.items())
    assert told.read_bytes == done.read_bytes
    return told, done


def test_what_the_budget_has_room_for_is_read_once_and_proved_once(source, tmp_path):
    _, done = exported(source, tmp_path)
    assert done.read_bytes <= 2.1 * done.num_bytes


def test_what_it_has_no_room_for_is_read_again_as_often_as_the_budget_makes_parts_of_it(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(outbound, "staging_bytes", lambda settings: 64 << 20)
    _, done = exported(source, tmp_path, 256 << 20)
    num_parts = 3
    assert 2.1 * done.num_bytes < done.read_bytes <= (num_parts + 1.1) * done.num_bytes
