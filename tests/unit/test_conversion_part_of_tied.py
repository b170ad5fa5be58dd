"""A part of a model with tied weights: a tie goes where its weight goes, and is left out without it."""

import json

import pytest
import torch
from typer.testing import CliRunner

import checkpoint
from checkpoint import Adoption, Change, Emigration, Whereabouts
from checkpoint.errors import Misuse
from checkpoint.interop.formats.known import open_foreign
from checkpoint.store.memory import MemoryStore
from flows.cli import app
from tests.conversion_samples import adam_state, save_state

TIES = {"lm_head.weight": "wte.weight"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the store of a GPT whose head is its embedding."""
    torch.manual_seed(0)
    weights = {"wte.weight": torch.randn(7, 4), "layers.0.weight": torch.randn(4, 4)}
    state = adam_state(weights)
    state["model"]["lm_head.weight"] = weights["wte.weight"]
    url = str(tmp_path_factory.mktemp("tied") / "store")
    save_state(checkpoint.open_store(url), state)
    return url


def export(source, target, format, only=None):
    checkpoint.export_foreign(Whereabouts(source), str(target), Emigration(format, only=only))
    return str(target)


def ask(*arguments):
    return CliRunner().invoke(app, list(arguments), terminal_width=120)


@pytest.mark.parametrize(
    ("format", "only"),
    [
        ("torch", "model/layers*"),
        ("torch", "optimizer/*"),
        ("dcp", "model/layers*"),
        ("dcp", "optimizer/*"),
        ("deepspeed-universal", "*layers*"),
        ("hf", "model/layers*"),
    ],
)
def test_a_part_without_the_tied_weight_comes_back_without_a_word_of_it(source, tmp_path, format, only):
    part, back = export(source, tmp_path / "part", format, only), str(tmp_path / "back")
    done = ask("import", part, back, "--json")
    assert done.exit_code == 0, done.output
    assert not [note for note in json.loads(done.stdout)["notes"] if "ties" in note]
    assert "lm_head.weight" not in checkpoint.load(checkpoint.open_store(back)).state.get("model", {})
    compared = checkpoint.compare_places(Whereabouts(part), Whereabouts(source))
    there = [one for one in compared if one.first and one.second]
    assert there and {one.verdict.value for one in there} == {"equal"}


def test_a_part_keeps_the_ties_that_resharding_keeps(source, tmp_path):
    for only in ("model/*", "model/wte*"):
        kept = MemoryStore(only)
        checkpoint.reshard(checkpoint.open_store(source), kept, Change(only=only))
        back = MemoryStore(f"back {only}")
        part = export(source, tmp_path / only.replace("/", "_"), "torch", only)
        checkpoint.import_foreign(part, back, Adoption())
        model = checkpoint.load(back).state["model"]
        assert model["lm_head.weight"] is model["wte.weight"]
        assert set(model) == set(checkpoint.load(kept).state["model"])


def stale(path):
    """Write a file that tells of a tie whose weight it does not hold, as older releases did."""
    torch.save({"model": {"layers.0.weight": torch.ones(2)}, "tied": TIES}, path)
    return str(path)


def test_a_tie_that_a_file_tells_of_a_weight_that_is_not_there_is_left_out_with_a_note(source, tmp_path):
    url, store = stale(tmp_path / "a.pt"), MemoryStore("s")
    report = checkpoint.import_foreign(url, store, Adoption())
    assert [note for note in report.notes if "not there" in note] == [
        "ties of weights that are not there are left out: lm_head.weight"
    ]
    assert set(checkpoint.load(store).state["model"]) == {"layers.0.weight"}
    assert ask("diff", url, source, "--json").exit_code == 1, "they differ, and that is no wrong usage"
    again = export(url, tmp_path / "again", "torch")
    assert "tied" not in open_foreign(again).about.extra


@pytest.mark.parametrize("told", [{"a": "b", "b": "a"}, {"a": 5}, {"a": ["w"]}, {3: "w"}, {}, 7])
def test_what_a_file_calls_tied_and_cannot_be_is_noted_or_kept_as_its_own(told, tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "tied": told}, tmp_path / "a.pt")
    store = MemoryStore("s")
    report = checkpoint.import_foreign(str(tmp_path / "a.pt"), store, Adoption())
    state = checkpoint.load(store).state
    assert set(state["model"]) == {"w"}
    if told == {"a": "b", "b": "a"}:  # as we tell of ties, and of none that can be
        assert any(note.startswith("ties of weights that are not there") for note in report.notes)
    else:
        assert state["containers"]["kept"] == {"tied": told} and not report.notes


def test_a_tie_that_people_tell_of_a_weight_that_is_not_there_is_their_mistake(tmp_path):
    url = stale(tmp_path / "a.pt")
    with pytest.raises(Misuse, match=r"'lm_head\.weight' cannot be tied to 'wte\.weight'"):
        checkpoint.import_foreign(url, MemoryStore("s"), Adoption(ties=TIES))
    right = {"lm_head.weight": "layers.0.weight"}
    report = checkpoint.import_foreign(url, MemoryStore("s"), Adoption(ties=right))
    assert not [note for note in report.notes if "ties" in note]
