"""A part of a foreign checkpoint (`--only`), and optimizers whose states could be anybody's."""

import pytest
import torch

import checkpoint
from checkpoint import Adoption, Emigration, Misuse, Numbering, Unsupported, Whereabouts
from checkpoint.store.memory import MemoryStore
from tasks.convert import ConversionOrder, carry_out


def fine_tuned() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose middle is frozen, and an optimizer of the rest."""
    torch.manual_seed(5)
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    net[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([one for one in net.parameters() if one.requires_grad])
    return net, optimizer


def save_stepped(net, optimizer, path) -> dict:
    """Make a step, and save the state as most programs do."""
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(state, path)
    return state


@pytest.fixture
def frozen(tmp_path):
    """Such a state, and where."""
    path = tmp_path / "frozen.pt"
    return str(path), save_stepped(*fine_tuned(), path)


def test_whose_states_cannot_be_told_is_refused_and_says_what_can_be_done(frozen):
    url, _ = frozen
    for numbering in Numbering:
        with pytest.raises(Unsupported, match=r"numbers 4 parameters.*named_parameters.*--only 'model/\*'"):
            checkpoint.import_foreign(url, MemoryStore("s"), Adoption(numbering=numbering))


def test_its_weights_alone_are_imported(frozen):
    url, state = frozen
    store = MemoryStore("s")
    report = checkpoint.import_foreign(url, store, Adoption(only="model/*"))
    assert (report.num_tensors, report.notes) == (6, ())
    plan = checkpoint.plan_import_foreign(url, MemoryStore("t"), Adoption(only="model/*"))
    assert (plan.num_tensors, plan.num_bytes) == (6, report.num_bytes)
    found = checkpoint.load(store).state
    assert found.keys() - {"containers"} == {"model", "epoch"} and found["epoch"] == 3
    assert all(torch.equal(found["model"][name], one) for name, one in state["model"].items())


def test_its_weights_alone_are_exported(frozen, tmp_path):
    url, state = frozen
    where = Whereabouts(url)
    with pytest.raises(Unsupported, match="--only"):
        checkpoint.export_foreign(where, str(tmp_path / "dcp"), Emigration("dcp"))
    for format, only in (("hf", None), ("torch", "model/*")):
        target = str(tmp_path / format)
        checkpoint.export_foreign(where, target, Emigration(format, only=only))
        told = checkpoint.compare_places(Whereabouts(target), where)
        assert sorted(one.name for one in told if one.verdict is checkpoint.Verdict.EQUAL) == sorted(
            f"model/{name}" for name in state["model"]
        )


def test_it_is_looked_at_and_compared_as_it_is(frozen):
    url, _ = frozen
    found = checkpoint.look_at_foreign(url)
    assert sum(one.name.startswith("other.optimizer.state.") for one in found.tensors) == 12
    assert any("numbers 4 parameters" in note for note in found.notes)
    assert all(
        one.verdict is checkpoint.Verdict.EQUAL
        for one in checkpoint.compare_places(Whereabouts(url), Whereabouts(url))
    )


def test_a_part_of_the_weights_and_of_the_optimizer(tmp_path):
    net, _ = fine_tuned()
    optimizer = torch.optim.AdamW(net.named_parameters())
    save_stepped(net, optimizer, tmp_path / "x.pt")
    store = checkpoint.open_store(str(tmp_path / "store"))
    order = ConversionOrder(source=str(tmp_path / "x.pt"), target=str(tmp_path / "store"), only="*2.*")
    assert carry_out(order).num_tensors == 8
    found = checkpoint.load(store).state
    assert found["model"].keys() == {"2.weight", "2.bias"} == found["optimizer"]["state"].keys()
    moments = found["optimizer"]["state"]["2.bias"]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][5]["exp_avg"])


def test_the_order_of_an_optimizer_that_is_left_out_is_nobody_s_doubt(tmp_path):
    net, _ = fine_tuned()
    save_stepped(net, torch.optim.AdamW(net.parameters()), tmp_path / "x.pt")
    source, weights = str(tmp_path / "x.pt"), Adoption(only="model/*")
    with pytest.raises(Unsupported, match=r"--by-order.*--only"):
        checkpoint.import_foreign(source, MemoryStore("s"), Adoption())
    assert checkpoint.import_foreign(source, MemoryStore("s"), weights).num_tensors == 6


def test_names_that_fit_nothing_are_wrong_usage(frozen):
    with pytest.raises(Misuse, match=r"'zz\*' fits nothing of .*model/NAME"):
        checkpoint.import_foreign(frozen[0], MemoryStore("s"), Adoption(only="zz*"))
