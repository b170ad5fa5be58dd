"""Orders of conversions, as the UI's form gives them: there and back, and what is refused."""

import pytest
import torch
from prefect.states import Failed
from pydantic import ValidationError

import checkpoint
from checkpoint.errors import FormatError, Misuse, NoCheckpoint, StoreUnavailable
from tasks.convert import ConversionOrder, carry_out, describe, may_pass
from tests.conversion_samples import bits_of, block_weights, save_state
from tests.resharding_matrix import MODELS, make_truth

RENAMING = "rules: 1\nname: renaming\nmap:\n  - {from: w, to: v}\n"


def test_a_model_goes_out_and_comes_back(tmp_path):
    store, model, again, back = (str(tmp_path / name) for name in ("store", "model", "again", "back"))
    save_state(checkpoint.open_store(store), {"model": block_weights()})
    assert carry_out(ConversionOrder(source=store, target=model, target_format="hf")).num_tensors == 7
    order = ConversionOrder(source=model, target=again, source_format="hf", target_format="torch")
    assert len(carry_out(order).proofs) == 7
    order = ConversionOrder(source=again, target=back, source_format="torch", to="shard=3", step=3)
    assert carry_out(order).layout == "shard=3"
    assert bits_of(checkpoint.open_store(back)) == bits_of(checkpoint.open_store(store))


def test_the_home_directory_may_be_named_as_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/rules.yaml").write_text(RENAMING)
    save_state(checkpoint.open_store("~/store"), {"model": {"w": torch.ones(2)}})
    carry_out(ConversionOrder(source="~/store", target="~/cut", to="shard=2"))
    carry_out(ConversionOrder(source="~/cut", target="~/torch", target_format="torch"))
    carry_out(ConversionOrder(source="~/torch", target="~/dcp", target_format="dcp", source_format="torch"))
    report = carry_out(ConversionOrder(source="~/dcp", target="~/back", rules="~/rules.yaml"))
    assert [one.name for one in report.proofs] == ["model/v"]
    assert {one.name for one in tmp_path.iterdir()} == {"home"}
    assert {one.name for one in (tmp_path / "home").iterdir()} >= {"store", "cut", "torch", "dcp", "back"}


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(FormatError, match="import it into a store first"):
        carry_out(ConversionOrder(source="a", target="b", source_format="hf", dtype="bf16"))
    with pytest.raises(ValidationError, match="memory_budget_mib"):
        ConversionOrder(source="a", target="b", memory_budget_mib=1)
    with pytest.raises(ValidationError, match="too"):
        ConversionOrder.model_validate({"source": "a", "target": "b", "too": 1})


@pytest.mark.parametrize(
    ("error", "again"), [(StoreUnavailable("gone"), True), (NoCheckpoint("none"), False)]
)
def test_only_what_may_pass_is_tried_again(error, again):
    assert may_pass(None, None, Failed(data=error)) is again


def test_a_source_is_looked_at_for_what_it_is_and_a_dry_run_writes_nothing(tmp_path):
    store, model, back = (str(tmp_path / name) for name in ("store", "model", "back"))
    save_state(checkpoint.open_store(store), {"model": block_weights()})
    order = ConversionOrder(source=store, target=model, target_format="hf", dry_run=True)
    assert carry_out(order).is_dry
    assert not (tmp_path / "model").exists()
    carry_out(order.model_copy(update={"dry_run": False}))
    order = ConversionOrder(source=model, target=back, run="taken over", step=4)
    assert carry_out(order.model_copy(update={"dry_run": True})).is_dry
    assert not carry_out(order).is_dry
    assert checkpoint.Catalog(checkpoint.open_store(back)).manifest(4).run == "taken over"
    order = ConversionOrder(source=back, target=str(tmp_path / "cut"), to="shard=2", dry_run=True)
    assert carry_out(order).is_dry


def test_a_foreign_source_goes_into_another_format_each_by_its_own_rules(tmp_path):
    name, sizes = MODELS["Llama"]
    told = [f"{key}={value}" for key, value in sizes.items()]
    store, ranks, model = (str(tmp_path / one) for one in ("store", "ranks", "model"))
    checkpoint.promote(make_truth("Llama").store, checkpoint.open_store(store), 9)
    out = ConversionOrder(
        source=store,
        target=ranks,
        target_format="megatron",
        only="model/*",
        to="tensor=2",
        rules=name,
        sizes=told,
    )
    assert carry_out(out).num_tensors == 21
    order = ConversionOrder(
        source=ranks, target=model, target_format="hf", source_rules=name, source_sizes=told, rules="llama-hf"
    )
    assert len(carry_out(order).proofs) == 21
    with pytest.raises(FormatError, match="name these"):
        carry_out(ConversionOrder(source=store, target=ranks, sizes=told))


def test_a_cast_that_loses_numbers_takes_leave(tmp_path):
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    save_state(checkpoint.open_store(store), {"model": {"w": torch.tensor([7e4])}})
    order = ConversionOrder(source=store, target=out, dtype="fp16")
    with pytest.raises(Misuse, match="beyond float16"):
        carry_out(order)
    assert len(carry_out(order.model_copy(update={"allow_overflow": True})).notes) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": "store", "source_rules": "x", "ties": ["a=b"]},
            "a resharding has no use for source_r.*, ties",
        ),
        ({"source": "store", "target_format": "hf", "run": "mine"}, "an export has no use for run"),
        ({"source": "model", "source_rules": "x"}, "an import has no use for source_rules"),
    ],
)
def test_what_a_direction_has_no_use_for_is_refused_by_name(fields, message, tmp_path):
    save_state(checkpoint.open_store(str(tmp_path / "store")), {"model": block_weights()})
    fields["source"] = str(tmp_path / fields["source"])
    with pytest.raises(FormatError, match=message):
        carry_out(ConversionOrder(target=str(tmp_path / "out"), **fields))
    assert not (tmp_path / "out").exists()


def test_what_was_only_rehearsed_is_told_as_that(tmp_path):
    save_state(checkpoint.open_store(str(tmp_path / "store")), {"model": block_weights()})
    order = ConversionOrder(source=str(tmp_path / "store"), target=str(tmp_path / "out"), dry_run=True)
    assert "dry run: nothing was written" in describe(carry_out(order))
    done = describe(carry_out(order.model_copy(update={"dry_run": False})))
    assert "dry run" not in done and "would" not in done
