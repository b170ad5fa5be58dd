"""The flow of conversions, run as a flow: there and back through a foreign format, and what is refused."""

import pytest
import torch
from prefect.testing.utilities import prefect_test_harness

import checkpoint
from checkpoint.errors import FormatError
from flows.resharding import resharding
from tasks.convert import ConversionOrder
from tests.conversion_samples import bits_of, block_weights, save_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


def test_a_model_goes_out_and_comes_back_through_the_flow(tmp_path):
    store, model, back = (str(tmp_path / name) for name in ("store", "model", "back"))
    save_state(checkpoint.open_store(store), {"model": block_weights(dtype=torch.float32)})
    resharding(ConversionOrder(source=store, target=model, target_format="hf"))
    resharding(ConversionOrder(source=model, target=back, source_format="hf", to="shard=3", step=3))
    assert bits_of(checkpoint.open_store(back)) == bits_of(checkpoint.open_store(store))


def test_what_cannot_be_ordered_is_refused(tmp_path):
    order = ConversionOrder(source="a", target="b", source_format="hf", dtype="bf16")
    with pytest.raises(FormatError, match="import it into a store first"):
        resharding.with_options(retries=0)(order)
