"""Orders of conversions, as the UI's form gives them: there and back, and what is refused."""

import pytest
from prefect.states import Failed
from pydantic import ValidationError

import checkpoint
from checkpoint.errors import FormatError, NoCheckpoint, StoreUnavailable
from tasks.convert import ConversionOrder, carry_out, may_pass
from tests.conversion_samples import bits_of, block_weights, save_state


def test_a_model_goes_out_and_comes_back(tmp_path):
    store, model, again, back = (str(tmp_path / name) for name in ("store", "model", "again", "back"))
    save_state(checkpoint.open_store(store), {"model": block_weights()})
    assert carry_out(ConversionOrder(source=store, target=model, target_format="hf")).num_tensors == 7
    order = ConversionOrder(source=model, target=again, source_format="hf", target_format="torch")
    assert len(carry_out(order).proofs) == 7
    order = ConversionOrder(source=again, target=back, source_format="torch", to="shard=3", step=3)
    assert carry_out(order).layout == "shard=3"
    assert bits_of(checkpoint.open_store(back)) == bits_of(checkpoint.open_store(store))


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
