"""The stand-alone interface in one process: whatever a training loop has comes back, or an error says why."""

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoint.checkpointer import Checkpointer, Options, Rng
from checkpoint.engine.per_rank import PerRank, per_rank_values
from checkpoint.engine.transfer import Transfer
from checkpoint.errors import CheckpointError, Corrupt, FormatError, Mismatch, StoreRefused, Unsupported
from checkpoint.store.open import open_store
from tests.fault.checkpoint_worlds import same_bits

SMALL = Options(arena_mib=8)


class Net(nn.Module):
    """Tied weights, a frozen layer, buffers that change in forward, and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(requires_grad=False)
        self.head = nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight
        self.num_seen = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_seen += len(tokens)
        found: torch.Tensor = self.head(self.frozen(self.norm(self.embed(tokens))))
        return found

    def get_extra_state(self) -> Any:
        return {"num_seen": self.num_seen}

    def set_extra_state(self, state: Any) -> None:
        self.num_seen = state["num_seen"]


def make(seed: int, **settings: Any) -> dict[str, Any]:
    """A whole training state; the seed decides the weights, so that two are different."""
    torch.manual_seed(seed)
    model = Net()
    groups: list[dict[str, Any]] = [
        {"params": [model.embed.weight], "lr": 0.01},
        {"params": model.norm.parameters()},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": Rng(), "epoch": seed}


def train(state: dict[str, Any], num_steps: int) -> None:
    for _ in range(num_steps):
        state["model"](torch.randint(0, 37, (8,))).square().mean().backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["optimizer"].zero_grad()


def everything(state: dict[str, Any]) -> dict[str, Any]:
    """All that decides how training goes on, copied."""
    held = {
        "model": state["model"].state_dict(),
        "optimizer": state["optimizer"].state_dict(),
        "scheduler": state["scheduler"].state_dict(),
        "draws": [random.random(), float(np.random.rand()), torch.rand(3)],
        "epoch": state["epoch"],
    }
    return torch.utils._pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, held
    )


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"amsgrad": True, "foreach": False}], ids=str)
def test_training_goes_on_bit_for_bit_as_if_it_had_not_stopped(tmp_path, settings):
    url = f"memory://{tmp_path}"
    state = make(1, **settings)
    with Checkpointer(url, options=SMALL) as saving:
        train(state, 3)
        saving.save(3, state, metrics={"loss": 0.5}, cursor={"seen": 24})
        train(state, 2)
    expected, again = everything(state), make(2, **settings)
    with Checkpointer(url, options=SMALL) as restoring:
        restored = restoring.restore(again)
    assert restored is not None and restored.step == 3 and restored.notes == ()
    assert again["epoch"] == 1 and again["model"].head.weight is again["model"].embed.weight
    train(again, 2)
    assert same_bits(everything(again), expected)
    assert "initial_lr" in again["optimizer"].param_groups[0]


def test_a_restore_writes_into_the_very_tensors_that_are_there(tmp_path):
    state, again = make(1), make(2)
    train(state, 1)
    train(again, 1)
    url = f"memory://{tmp_path}"
    weight = again["model"].embed.weight
    moment = again["optimizer"].state[weight]["exp_avg"]
    with Checkpointer(url, options=SMALL) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait()
        checkpointer.restore(again)
    assert again["model"].embed.weight is weight and again["optimizer"].state[weight]["exp_avg"] is moment
    assert torch.equal(moment, state["optimizer"].state[state["model"].embed.weight]["exp_avg"])


def test_an_optimizer_without_state_is_saved_without_stepping_it_and_comes_back_without(tmp_path):
    state, again = make(1), make(2)
    train(again, 1)
    before = [parameter.clone() for parameter in state["model"].parameters()]
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(0, state)
        assert checkpointer.wait()
        checkpointer.restore(again)
    assert all(map(torch.equal, before, state["model"].parameters()))
    assert state["optimizer"].state == {} and again["optimizer"].state_dict()["state"] == {}


def test_moments_keep_a_type_that_is_not_their_parameter_s(tmp_path):
    def build(fill: float) -> dict[str, Any]:
        model = nn.Linear(4, 4).bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        optimizer.state[model.weight]["momentum_buffer"] = torch.full((4, 4), fill)
        return {"model": model, "optimizer": optimizer}

    state, again = build(1 + 2**-20), build(0)
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait()
        checkpointer.restore(again)
    found = again["optimizer"].state[again["model"].weight]["momentum_buffer"]
    assert found.dtype is torch.float32 and (found == 1 + 2**-20).all()


def test_the_optimizer_s_state_goes_by_names_so_parameters_may_come_in_another_order(tmp_path):
    model, other = nn.Linear(3, 5), nn.Linear(3, 5)
    first = torch.optim.Adam(model.parameters())
    second = torch.optim.Adam(reversed(list(other.parameters())))
    model(torch.ones(1, 3)).sum().backward()
    first.step()
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": first})
        assert checkpointer.wait()
        checkpointer.restore({"model": other, "optimizer": second})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first.state[one]["exp_avg"], second.state[two]["exp_avg"])


def test_a_compiled_or_wrapped_name_is_the_model_s_own(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": torch.compile(model, backend="eager")})
        assert checkpointer.wait()
        checkpointer.restore({"model": other})
    assert torch.equal(model.weight, other.weight)


def test_a_part_of_a_checkpoint_can_be_restored_alone(tmp_path):
    state, model = make(1), Net()
    train(state, 1)
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait()
        checkpointer.restore({"model": model})
    assert all(map(torch.equal, state["model"].parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": nn.Linear(4, 3)}, r"model/weight is float32\[3, 4\] here and float32\[4, 4\]"),
        ({"model": nn.Linear(4, 4).double()}, r"model/weight is float64"),
        ({"model": nn.Linear(4, 4, bias=False)}, r"does not fit model; unknown here: bias"),
        ({"model": nn.Sequential(nn.Linear(4, 4))}, r"absent: 0.bias, 0.weight; unknown here: bias, weight"),
        ({"scheduler": 1}, r"does not fit the state; absent: scheduler"),
        ({"model": torch.zeros(4)}, r"model is a tensor here, and none"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, wrong, says):
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": nn.Linear(4, 4)})
        assert checkpointer.wait()
        with pytest.raises(Mismatch, match=says):
            checkpointer.restore(wrong)


def test_groups_that_are_divided_differently_are_refused(tmp_path):
    model = nn.Linear(4, 4)
    halves: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias]}]
    two = torch.optim.SGD(halves, lr=1.0)
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5)})
        assert checkpointer.wait()
        with pytest.raises(Mismatch, match="divided differently"):
            checkpointer.restore({"model": model, "optimizer": two})


def test_weights_that_are_tied_here_cannot_silently_take_two_values(tmp_path):
    tied, loose = Net(), Net()
    loose.head.weight = nn.Parameter(loose.embed.weight.detach() + 1)
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": loose})
        assert checkpointer.wait()
        with pytest.raises(Mismatch, match=r"one tensor here \(tied weights\) and two in the checkpoint"):
            checkpointer.restore({"model": tied})


def test_a_tied_weight_is_filled_from_two_that_are_equal_or_from_one_by_either_name(tmp_path):
    saved = dict(Net().state_dict())
    saved["head.weight"] = saved["embed.weight"].clone()
    for number, left_out in enumerate((None, "head.weight", "embed.weight")):
        model = {name: tensor for name, tensor in saved.items() if name != left_out}
        tied = Net()
        with torch.no_grad():
            tied.embed.weight.zero_()
        with Checkpointer(f"memory://{tmp_path}/{number}", options=SMALL) as checkpointer:
            checkpointer.save(1, {"model": model})
            assert checkpointer.wait()
            checkpointer.restore({"model": tied})
        assert torch.equal(tied.head.weight, saved["embed.weight"]) and tied.head.weight is tied.embed.weight


def test_a_name_that_is_not_stored_is_absent_if_no_other_name_of_it_is(tmp_path):
    loose = Net()
    loose.head.weight = nn.Parameter(loose.embed.weight.detach().clone())
    model = {name: one for name, one in loose.state_dict().items() if name != "head.weight"}
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, {"model": model})
        assert checkpointer.wait()
        with pytest.raises(Mismatch, match=r"absent: head\.weight"):
            checkpointer.restore({"model": loose})


def test_only_due_steps_are_saved_and_a_saving_tells_what_became_of_them(tmp_path):
    model = nn.Linear(2, 2)
    with Checkpointer(f"memory://{tmp_path}", every=3, options=SMALL) as checkpointer:
        savings = [checkpointer.save(step, {"model": model}) for step in range(1, 7)]
        assert [saving is not None for saving in savings] == [False, False, True] * 2
        saving = savings[-1]
        assert saving is not None and saving.durable().result(20).step == 6
        assert saving.captured.done() and saving.durable("store").done()
        with pytest.raises(ValueError, match="goes to store, not to 'far'"):
            saving.durable("far")
        assert checkpointer.latest() == 6
    assert checkpointer.save(9, {"model": model}, depth="store") is not None
    checkpointer.close()
    assert checkpointer.latest() == 9


def test_a_snapshot_that_is_torn_says_so_and_raises_where_it_is_waited_for(tmp_path, monkeypatch):
    weight, may_copy = torch.zeros(100_000), threading.Event()
    monkeypatch.setattr(Transfer, "prepare", lambda *_: may_copy.wait(20))
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        saving = checkpointer.save(1, {"weight": weight})
        weight.add_(1)
        may_copy.set()
        assert saving is not None
        with pytest.raises(CheckpointError, match="'weight' changed while step 1 was captured"):
            saving.durable().result(20)
        assert saving.captured.exception(20) is not None
        assert checkpointer.latest() is None


def test_a_buffer_that_the_next_forward_changes_is_saved_as_it_was(tmp_path, monkeypatch):
    class Codebook(nn.Module):
        codes: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(50_000))

    model, again, may_copy = Codebook(), Codebook(), threading.Event()
    monkeypatch.setattr(Transfer, "prepare", lambda *_: may_copy.wait(20))
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        saving = checkpointer.save(1, {"model": model})
        model.codes += 1
        may_copy.set()
        assert saving is not None and saving.durable().result(20).step == 1
        again.codes += 5
        checkpointer.restore({"model": again})
    assert (again.codes == 0).all()


def test_what_cannot_be_saved_is_refused_by_name_and_a_bad_place_at_once(tmp_path):
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        with pytest.raises(FormatError, match=r"config is a builtins\.object"):
            checkpointer.save(1, {"config": object()})
        with pytest.raises(Unsupported, match=r"w: a Tensor \(torch.sparse_coo"):
            checkpointer.save(1, {"w": torch.ones(2).to_sparse()})
    with pytest.raises(StoreRefused):
        Checkpointer("")
    with pytest.raises(ValueError, match="every 0"):
        Checkpointer("memory://x", every=0)


def test_steps_only_grow_until_an_older_one_is_restored(tmp_path):
    state = {"weight": torch.zeros(3)}
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state)
        with pytest.raises(ValueError, match="step 2 is not newer than step 2"):
            checkpointer.save(2, state)
        assert checkpointer.restore(state, step=1, newer="set aside") is not None
        saving = checkpointer.save(2, state)
        assert saving is not None and saving.durable().result(20).step == 2


def test_there_is_nothing_to_restore_in_a_new_store(tmp_path):
    with Checkpointer(f"memory://{tmp_path}") as checkpointer:
        assert checkpointer.restore({"epoch": 0}) is None and checkpointer.latest() is None


def test_a_damaged_checkpoint_is_passed_over_and_the_report_says_so(tmp_path):
    url, weight = f"memory://{tmp_path}", torch.zeros(100)
    with Checkpointer(url, options=SMALL) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"weight": weight.fill_(step)})
            assert checkpointer.wait()
        store = open_store(url)
        newest = max(entry.key for entry in store.list("packs/"))
        num_bytes = len(store.read(newest)[0])
        store.delete(newest)
        store.put_new(newest, bytes(num_bytes))
        again = {"weight": torch.empty(100)}
        restored = checkpointer.restore(again)
        assert restored is not None and restored.step == 1 and (again["weight"] == 1).all()
        assert [one.step for one in restored.report.fallbacks] == [2]
        saving = checkpointer.save(2, again)
        assert saving is not None and saving.durable().result(20).step == 2
        mended = checkpointer.restore(again)
    assert mended is not None and (mended.step, mended.report.fallbacks) == (2, ())


def test_a_data_loader_and_generators_are_each_rank_s_own(tmp_path):
    class Loader(DataLoader[int]):
        position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    loader, other = Loader([1, 2, 3]), Loader([1, 2, 3])  # type: ignore[arg-type]
    loader.position = 2
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    state = {"loader": loader, "generator": generator, "own": PerRank({"rank": 0})}
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait()
        again: dict[str, Any] = {"loader": other, "generator": torch.Generator(), "own": PerRank({})}
        restored = checkpointer.restore(again)
    assert restored is not None and other.position == 2 and again["own"].value == {"rank": 0}
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=again["generator"]))
    assert restored.per_rank["loader"] == ({"position": 2},)


def test_a_per_rank_value_has_a_bound_and_damage_to_it_is_noticed():
    with pytest.raises(Unsupported, match=r"max_bytes=2048"):
        PerRank("x" * 1500, max_bytes=1024).row()
    value = {"a": (1, 2.5, None), "b": torch.arange(5), "empty": torch.empty(0, 3)}
    row = PerRank(value).row()
    assert same_bits(per_rank_values(row)[0], value)
    row[0, 0] = 255
    row[0, 7] = 255
    with pytest.raises(Corrupt):
        per_rank_values(row)
