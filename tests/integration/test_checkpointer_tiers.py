"""Through a keeper: near and far tiers, retention, memory; and what is left when the nearest is lost."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from checkpoint import (
    Catalog,
    Checkpointer,
    LatestN,
    Mismatch,
    Options,
    StoreRefused,
    Tier,
    open_store,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tmp_path):
    tmp_path.chmod(0o700)
    far = Tier(str(tmp_path / "far"), every=2, name="far")
    return Options(tiers=(far,), arena_mib=2, lease_s=0.3, directory=tmp_path / "keeper")


def test_each_tier_gets_what_is_due_there_and_a_lost_one_is_done_without(tmp_path, options):
    near, model = str(tmp_path / "near"), nn.Linear(8, 8)
    with Checkpointer(near, keep=(LatestN(2),), memory=1, options=options) as checkpointer:
        for step in range(1, 6):
            with torch.no_grad():
                model.weight.fill_(step)
            saving = checkpointer.save(step, {"model": model})
            assert saving is not None and saving.tiers == (
                ("store", "far", "memory") if step % 2 == 0 else ("store", "memory")
            )
            assert saving.durable("memory").result(30).step == step
            if step % 2 == 0:
                assert saving.durable("far").result(30).tier == "far"
        assert checkpointer.wait() and checkpointer.latest() == 5
        again = nn.Linear(8, 8)
        restored = checkpointer.restore({"model": again})
        assert restored is not None and restored.report.bytes_by_source.keys() == {"memory"}
        assert (again.weight == 5).all()
    assert Catalog(open_store(str(tmp_path / "far"))).steps() == [2, 4]
    shutil.rmtree(tmp_path / "near")
    elsewhere = replace(options, directory=tmp_path / "other")
    with Checkpointer(near, run="successor", options=elsewhere) as checkpointer:
        restored = checkpointer.restore({"model": again}, run="run")
        assert restored is not None and restored.step == 4 and (again.weight == 4).all()
        assert restored.report.bytes_by_source.keys() == {"far"}


def test_an_arena_is_made_to_measure_and_grows_with_nobody_s_help(tmp_path):
    tmp_path.chmod(0o700)
    model = nn.Linear(256, 1024)
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    options = Options(lease_s=0.3, directory=tmp_path / "keeper")
    with Checkpointer(str(tmp_path / "store"), options=options) as checkpointer:
        saving = checkpointer.save(0, state)  # before there are any moments
        for step in range(1, 4):
            model(torch.ones(2, 256)).sum().backward()
            optimizer.step()
            saving = checkpointer.save(step, state)
        assert saving is not None and saving.durable().result(30).step == 3


def test_a_store_that_cannot_be_used_is_refused_when_the_checkpointer_is_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreRefused):
        Checkpointer(str(tmp_path / "file"))


def test_another_model_s_checkpoint_is_refused_and_nothing_is_set_aside(tmp_path):
    tmp_path.chmod(0o700)
    options = Options(arena_mib=2, lease_s=0.3, directory=tmp_path / "keeper")
    with Checkpointer(str(tmp_path / "store"), options=options) as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(2, 2)})
        assert checkpointer.wait()
        with pytest.raises(Mismatch):
            checkpointer.restore({"model": nn.Linear(2, 3)})
        assert checkpointer.latest() == 1
