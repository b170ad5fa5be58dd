"""What lies beside a model in a training's state comes back where it was, as it was, in torch and dcp."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import checkpoint
from checkpoint.errors import Unsupported
from tests.conversion_samples import save_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

BY_ORDER = checkpoint.Numbering.BY_ORDER


class Two(torch.nn.Module):
    """A generator, and what judges it."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.d(self.g(x))


def stepped(model, *optimizers):
    """Make a step with each optimizer; return their states."""
    torch.manual_seed(3)
    for one in optimizers:
        model(torch.randn(4, 3)).square().sum().backward()
        one.step()
    return [one.state_dict() for one in optimizers]


def converted(tmp_path, source, format, numbering=checkpoint.Numbering.TOLD) -> tuple[str, list[str]]:
    """Import, and export again; return where, and what the import noted."""
    tmp_path.mkdir(exist_ok=True)
    store = checkpoint.open_store(str(tmp_path / "store"))
    notes = checkpoint.import_foreign(str(source), store, checkpoint.Adoption(numbering=numbering)).notes
    target = str(tmp_path / "out")
    checkpoint.export_foreign(checkpoint.Whereabouts(str(store)), target, checkpoint.Emigration(format))
    return target, list(notes)


def through(tmp_path, state, **more):
    """Return a state of torch.save as it comes back, without the step that an export tells, and the notes."""
    torch.save(state, tmp_path / "saved.pt")
    target, notes = converted(tmp_path, tmp_path / "saved.pt", "torch", **more)
    back = torch.load(f"{target}/checkpoint.pt", weights_only=True)
    return {key: item for key, item in back.items() if key in state}, notes


def assert_same(one, other, spot="state"):
    """See that two states are the same, containers and keys too; names of parameters may be added."""
    if isinstance(one, dict):
        assert isinstance(other, dict), spot
        assert one.keys() == {key for key in other if key in one or key != "param_names"}, spot
        for key, item in one.items():
            assert_same(item, other[key], f"{spot}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple) and len(one) == len(other), spot
        for number, item in enumerate(one):
            assert_same(item, other[number], f"{spot}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype, spot
    else:
        assert type(one) is type(other) and one == other, spot


def test_optimizers_that_call_their_parameters_alike_are_kept_apart(tmp_path):
    model = Two()
    adam = torch.optim.Adam(model.g.named_parameters())
    sgd = torch.optim.SGD(model.d.named_parameters(), lr=0.1, momentum=0.9)
    og, od = stepped(model, adam, sgd)
    state = {"generator": model.g.state_dict(), "discriminator": model.d.state_dict(), "og": og, "od": od}
    back, notes = through(tmp_path, state)
    assert_same(state, back)
    assert any("several optimizers, og, od" in note for note in notes)


@pytest.mark.parametrize("keys", [("optimizer", "optimizer_d"), ("optim_g", "optim_d")])
def test_two_optimizers_without_names_stay_numbered_each(tmp_path, keys):
    model = Two()
    states = stepped(model, torch.optim.Adam(model.g.parameters()), torch.optim.AdamW(model.d.parameters()))
    state = {"model": model.state_dict(), **dict(zip(keys, states, strict=True))}
    assert_same(state, through(tmp_path, state)[0])


def test_optimizers_in_a_list(tmp_path):
    model = Two()
    named = [(f"g.{name}", one) for name, one in model.g.named_parameters()]
    states = stepped(model, torch.optim.Adam(named), torch.optim.SGD(model.d.parameters(), momentum=0.5))
    state = {"model": model.state_dict(), "optimizers": states}
    assert_same(state, through(tmp_path, state)[0])


def test_the_one_optimizer_of_a_list_is_the_model_s(tmp_path):
    model = Two()
    (adam,) = stepped(model, torch.optim.Adam(model.named_parameters()))
    schedule = [{"last_epoch": 3, "_last_lr": [0.1]}]
    state = {"state_dict": model.state_dict(), "optimizer_states": [adam], "lr_schedulers": schedule}
    back, notes = through(tmp_path, state)
    assert_same(state, back)
    assert notes == []
    stored = checkpoint.load(checkpoint.open_store(str(tmp_path / "store"))).state
    assert torch.equal(stored["optimizer"]["state"]["g.bias"]["exp_avg"], adam["state"][1]["exp_avg"])


@pytest.mark.parametrize(
    "beside",
    [
        {"rng": [torch.get_rng_state(), random.getstate()]},
        {"cuda_rng": [torch.arange(3), torch.arange(4)]},
        {"deep": [{"a": torch.ones(1), "b": 1}, [torch.zeros(2), {"c": torch.ones(2)}], 5, None]},
        {"numbers": {0: torch.ones(2), 1: {"x": torch.ones(1), "n": 1}}, "dotted": {"a.b": torch.ones(3)}},
        {"around": {"model": {"w": torch.ones(2)}, 5: torch.ones(1), 6: {"n": 1, 7: 2}}},
        {"other": torch.ones(2), "extra": {3: torch.ones(1), "n": 1}, "tied": {"optim": [torch.ones(1), []]}},
        {5: {"state_dict": {"v": torch.ones(2)}, 6: 1}},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_lists_and_keys_come_back_as_they_were(tmp_path, beside):
    state = {"model": {"w": torch.ones(2)}, **beside} if "around" not in beside else beside
    assert_same(state, through(tmp_path, state)[0])


def test_what_lies_around_a_nested_model_stays_at_its_level(tmp_path):
    app = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "epoch": 3}
    state = {"app": app, "seed": 7, "rng": torch.arange(4)}
    assert_same(state, through(tmp_path, state)[0])


OWN_NAMES = ["containers", "files", "max_shard_bytes", "config", "args", "zero", "param_shapes", "tied"]
ODD = ["text", 7, ["x", 1], {"a": {"b": 1}}, {"param_groups": 5}, {1: 2}]


@pytest.mark.parametrize("value", [*ODD, None, {"name": "adamw", "lr": 0.1}], ids=repr)
@pytest.mark.parametrize("has_one", [False, True])
def test_what_is_called_optimizer_and_is_none_stays_what_it_is(tmp_path, value, has_one):
    model = Two()
    states = stepped(model, torch.optim.Adam(model.named_parameters()))
    state = {"model": model.state_dict(), "optimizer": value, **({"optim": states[0]} if has_one else {})}
    assert_same(state, through(tmp_path, state)[0])


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("format", ["torch", "dcp", "hf", "deepspeed-universal", "megatron"])
def test_plain_data_may_have_any_name_and_go_to_any_format(tmp_path, format, value):
    """As a program of one's own calls them; what a format has no place for, the report tells."""
    state = {"model": {"w": torch.ones(2, 2)}, **dict.fromkeys(OWN_NAMES, value)}
    torch.save(state, tmp_path / "saved.pt")
    target, plan = str(tmp_path / "out"), checkpoint.Emigration(format)
    report = checkpoint.export_foreign(checkpoint.Whereabouts(str(tmp_path / "saved.pt")), target, plan)
    if format == "torch":
        back = torch.load(f"{target}/checkpoint.pt", weights_only=True)
        del back["step"]
        assert_same(state, back)
    elif format != "dcp":
        assert any("left out" in note for note in report.notes)


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_user_s_own_checkpoint_may_have_any_names(tmp_path, value):
    """Of a run that was saved here, not imported."""
    store = checkpoint.open_store(str(tmp_path / "store"))
    state = {"model": {"w": torch.ones(2, 2)}, "optimizer": value, **dict.fromkeys(OWN_NAMES, value)}
    save_state(store, state)
    for format in ("torch", "dcp", "hf", "deepspeed-universal", "megatron"):
        target, plan = str(tmp_path / format), checkpoint.Emigration(format)
        checkpoint.export_foreign(checkpoint.Whereabouts(str(store)), target, plan)
    back = torch.load(str(tmp_path / "torch" / "checkpoint.pt"), weights_only=True)
    assert back["containers"] == back["optimizer"] == value


@pytest.mark.parametrize("depth", [1, 2])
def test_programs_that_nest_a_model_and_an_optimizer_each_have_them_back(tmp_path, depth):
    model = Two()
    og, od = stepped(
        model, torch.optim.Adam(model.g.parameters()), torch.optim.SGD(model.d.parameters(), momentum=0.9)
    )
    state: dict = {
        "netG": {"model": model.g.state_dict(), "optimizer": og, "epoch": 3},
        "netD": {"model": model.d.state_dict(), "optimizer": od, "names": ["a", "b"]},
    }
    state = {"all": state, "seed": 7} if depth == 2 else state
    back, notes = through(tmp_path, state)
    assert_same(state, back)
    assert any("several optimizers" in note and "netD.optimizer" in note for note in notes)
    stored = checkpoint.load(checkpoint.open_store(str(tmp_path / "store"))).state
    assert not any("exp_avg" in name for name in stored["model"])


def test_plain_data_within_models_by_name_are_kept(tmp_path):
    state = {"a": {"w": torch.ones(2), "epoch": 3}, "b": {"v": torch.ones(2), "deep": {"x": 1}, "e": {}}}
    assert_same(state, through(tmp_path, state)[0])


def test_a_model_s_own_state_comes_back_as_one_that_it_loads(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "saved.pt")
    for format, name in (("torch", "checkpoint.pt"), ("dcp", None)):
        target, _ = converted(tmp_path / format, tmp_path / "saved.pt", format)
        if name is not None:
            back = torch.load(f"{target}/{name}", weights_only=True)
            assert sorted(back) == sorted(model.state_dict())
            model.load_state_dict(back)
        assert all(
            one.verdict is checkpoint.Verdict.EQUAL
            for one in checkpoint.compare_places(
                checkpoint.Whereabouts(target), checkpoint.Whereabouts(str(tmp_path / "saved.pt"))
            )
        )


def test_a_model_may_have_a_module_called_state(tmp_path):
    state = {"model": {"state.weight": torch.ones(2), "state.bias": torch.ones(2)}, "epoch": 1}
    back, notes = through(tmp_path, state)
    assert_same(state, back)
    assert not notes


def test_models_by_name_stay_models_by_name(tmp_path):
    state = {"generator": Two().g.state_dict(), "discriminator": Two().d.state_dict()}
    assert_same(state, through(tmp_path, state)[0])


def test_lbfgs_goes_on(tmp_path):
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)

    def go_on(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return closure().item()

    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    go_on(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    back, _ = through(tmp_path, state, numbering=BY_ORDER)
    again = torch.nn.Linear(3, 2)
    again.load_state_dict(back["model"])
    other = torch.optim.LBFGS(again.parameters(), max_iter=4)
    other.load_state_dict(back["optimizer"])
    assert go_on(again, other) == go_on(model, optimizer)


def test_names_that_a_wrapper_s_optimizer_tells_are_the_model_s(tmp_path):
    model = Two()
    adam = torch.optim.Adam([(f"module.{name}", one) for name, one in model.named_parameters()])
    state = {"model": model.state_dict(), "optimizer": stepped(model, adam)[0]}
    through(tmp_path, state)
    stored = checkpoint.load(checkpoint.open_store(str(tmp_path / "store"))).state
    assert stored["optimizer"]["state"].keys() == stored["model"].keys()


def test_a_state_whose_name_cannot_be_told_from_a_parameter_s_is_refused(tmp_path):
    groups = [{"params": [0], "param_names": ["w"]}]
    optimizer = {"state": {0: {"exp.avg": torch.ones(3)}}, "param_groups": groups}
    with pytest.raises(Unsupported, match=r"'exp.avg'"):
        through(tmp_path, {"model": {"w": torch.ones(3)}, "optimizer": optimizer})


def of_torch(kind: str) -> dict:
    """Return a state as programs give it to torch's dcp.save."""
    model = Two()
    groups = [{"params": [model.g.weight, model.d.weight], "weight_decay": 0.3}]
    groups.append({"params": [model.g.bias, model.d.bias], "weight_decay": 0.0})
    adam = torch.optim.AdamW(groups, lr=0.1)
    parts = torch.optim.AdamW(model.g.parameters()), torch.optim.SGD(model.d.parameters(), momentum=0.9)
    stepped(model, adam, *parts)
    weights, flat = get_model_state_dict(model), StateDictOptions(flatten_optimizer_state_dict=True)
    beside = {"lr_scheduler": {"last_epoch": 3}, "train_state": {"ntokens": torch.tensor(7)}}
    match kind:
        case "flat":
            optimizer = get_optimizer_state_dict(model, adam, options=flat)
            return {"model": weights, "optimizer": optimizer, **beside}
        case "weights at the root":
            return {**weights, "optimizer": get_optimizer_state_dict(model, adam, options=flat), **beside}
        case "numbered":
            rng = {"cuda": [torch.get_rng_state()]}
            return {"model": weights, "optimizer": adam.state_dict(), "rng": rng}
        case "nested":
            return {"app": {"model": weights, "optim": get_optimizer_state_dict(model, adam), **beside}}
    some = [get_optimizer_state_dict(model, one, options=flat) for one in parts]
    if kind == "listed":
        return {"model": weights, "optim": some}
    return {"model": weights, "optim_g": some[0], "optim_d": get_optimizer_state_dict(model, parts[1])}


@pytest.mark.parametrize("kind", ["flat", "weights at the root", "numbered", "nested", "listed", "two"])
def test_a_program_loads_its_own_state_from_what_was_converted(tmp_path, kind):
    state, mine = of_torch(kind), of_torch(kind)
    dcp_save(state, checkpoint_id=str(tmp_path / "saved"), no_dist=True)
    numbering = BY_ORDER if kind == "numbered" else checkpoint.Numbering.TOLD
    target, _ = converted(tmp_path, tmp_path / "saved", "dcp", numbering)
    dcp_load(mine, checkpoint_id=target, no_dist=True)
    assert_same(state, mine)


@pytest.mark.parametrize("kind", ["several", "alone", "nested"])
def test_numbered_optimizers_come_back_numbered_by_way_of_dcp(tmp_path, kind):
    model = Two()
    og, od = stepped(model, torch.optim.Adam(model.g.parameters()), torch.optim.Adam(model.d.parameters()))
    state = {
        "several": {"model": model.state_dict(), "og": og, "od": od, "step": torch.tensor(77)},
        "alone": og,
        "nested": {
            "g": {"model": model.g.state_dict(), "o": og},
            "d": {"model": model.d.state_dict(), "o": od},
        },
    }[kind]
    torch.save(state, tmp_path / "saved.pt")
    dcp, _ = converted(tmp_path / "one", tmp_path / "saved.pt", "dcp")
    torch_file, _ = converted(tmp_path / "two", dcp, "torch")
    back = torch.load(f"{torch_file}/checkpoint.pt", weights_only=True)
    assert_same(state, {key: item for key, item in back.items() if key in state})


def test_a_folder_of_hugging_face_s_older_weights_is_one_too(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"model.norm.weight": torch.ones(4)}, folder / "pytorch_model.bin")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    config = {"model_type": "llama", "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_mine.py").write_text("raise SystemExit\n")
    seen = checkpoint.look_at_foreign(str(folder))
    assert seen.rules == "llama-hf" and any("not looked at: scheduler.pt" in note for note in seen.notes)
    target, _ = converted(tmp_path, folder, "hf")
    names = {path.name for path in Path(target).iterdir()}
    assert names == {"config.json", "tokenizer.json", "modeling_mine.py", "model.safetensors"}
    assert json.loads(Path(target, "config.json").read_text()) == config
    target, _ = converted(tmp_path / "again", folder, "torch")
    assert torch.load(f"{target}/checkpoint.pt").keys() == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("adapter_model", {"adapter_config.json": {"peft_type": "LORA"}}),
        ("diffusion_pytorch_model", {"config.json": {"_diffusers_version": "0.30"}}),
    ],
)
def test_weights_have_the_name_by_which_their_library_looks_for_them(tmp_path, name, beside):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4)}, folder / f"{name}.safetensors")
    for file, text in beside.items():
        (folder / file).write_text(json.dumps(text))
    target, _ = converted(tmp_path, folder, "hf")
    assert {path.name for path in Path(target).iterdir()} == {f"{name}.safetensors", *beside}
