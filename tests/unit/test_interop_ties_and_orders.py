"""Trainings of torch taken over: tied weights from any format, and optimizers that only number parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

import checkpoint
from checkpoint import Adoption, Emigration, Numbering, Whereabouts
from checkpoint.errors import Misuse, Unsupported
from checkpoint.interop.formats.known import open_foreign
from checkpoint.store.memory import MemoryStore

BY_ORDER = Adoption(numbering=Numbering.BY_ORDER)


class Net(nn.Module):
    """Tied, with layers of equal shape, and buffers of which one is an ordinary float."""

    def __init__(self, buffer: int = 5) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("h", torch.randn(buffer).to(torch.bfloat16))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(self.emb(tokens)))
        return found


def trained(net: nn.Module, parameters: Any, inputs: torch.Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters)
    net(inputs).square().mean().backward()
    optimizer.step()
    return optimizer


def net_and_optimizer(seed: int = 0, buffer: int = 5) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net(buffer)
    return net, trained(net, net.parameters(), torch.arange(6))


def saved(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def as_torch(net: Net, optimizer: torch.optim.Optimizer, path: Path) -> str:
    return saved({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)


def as_dcp(net: Net, optimizer: torch.optim.Optimizer, path: Path) -> str:
    model, states = get_state_dict(net, optimizer)
    save_dcp({"model": model, "optimizer": states}, checkpoint_id=path)
    return str(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [as_torch, as_dcp])
def test_a_training_with_tied_weights_goes_on_whatever_it_is_imported_from(save, tmp_path):
    net, optimizer = net_and_optimizer()
    url = save(net, optimizer, tmp_path / "source.pt")
    store = str(tmp_path / "store")
    checkpoint.import_foreign(url, checkpoint.open_store(store), BY_ORDER)
    other, fresh = net_and_optimizer(seed=1)
    with checkpoint.Checkpointer(store) as checkpointer:
        checkpointer.restore({"model": other, "optimizer": fresh})
    assert other.head.weight is other.emb.weight
    for one, two in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert all(
            torch.equal(optimizer.state[mine][kind], fresh.state[theirs][kind]) for kind in ("exp_avg",)
        )
    compared = checkpoint.compare_places(Whereabouts(url), Whereabouts(store))
    assert {one.verdict.value for one in compared} == {"equal"}


def test_memory_that_is_shared_in_a_file_of_torch_save_is_one_tensor_by_two_names(tmp_path):
    net, _ = net_and_optimizer()
    store = checkpoint.open_store(f"memory://{tmp_path}")
    checkpoint.import_foreign(saved(net.state_dict(), tmp_path / "x.pt"), store, Adoption())
    loaded = checkpoint.load(store).state["model"]
    assert loaded["head.weight"] is loaded["emb.weight"]
    views = {"all": torch.arange(6.0), "none": torch.zeros(0), "nothing": torch.zeros(0)}
    views |= {"part": views["all"][:3], "rest": views["all"][3:], "square": views["all"].view(2, 3)}
    assert not open_foreign(saved(views, tmp_path / "y.pt")).about.ties, "parts and views are no ties"


def test_a_file_with_tied_weights_goes_into_another_format_with_both_names(tmp_path):
    net, optimizer = net_and_optimizer()
    url = as_torch(net, optimizer, tmp_path / "x.pt")
    with pytest.raises(Unsupported, match="--by-order"):
        checkpoint.export_foreign(Whereabouts(url), str(tmp_path / "no"), Emigration("dcp"))
    assert not (tmp_path / "no").exists()
    source = Whereabouts(url, numbering=Numbering.BY_ORDER)
    checkpoint.export_foreign(source, str(tmp_path / "dcp"), Emigration("dcp"))
    names = [one.name for one in checkpoint.look_at_foreign(str(tmp_path / "dcp")).tensors]
    assert {"emb.weight", "head.weight"} <= set(names)
    checkpoint.export_foreign(Whereabouts(url), str(tmp_path / "hf"), Emigration("hf"))
    assert (tmp_path / "hf").exists(), "weights need no order"


def thrice(tmp_path: Path) -> str:
    save_file({name: torch.ones(4, 4) for name in "abc"}, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("order", [["a=b", "b=c"], ["b=c", "a=b"]])
def test_a_name_that_is_tied_to_a_tied_one_is_the_same_weight(order, tmp_path):
    store = MemoryStore("s")
    report = checkpoint.import_foreign(thrice(tmp_path), store, Adoption(ties=checkpoint.parse_ties(order)))
    assert [one.name for one in report.proofs] == ["model/c"]
    model = checkpoint.load(store).state["model"]
    assert model["a"] is model["b"] is model["c"]


@pytest.mark.parametrize("order", [["a=b", "b=a"], ["a=b", "b=c", "c=a"], ["c=a", "a=b", "b=a"]])
def test_names_that_are_tied_in_a_circle_are_wrong_usage(order, tmp_path):
    with pytest.raises(Misuse, match="the weight's own name"):
        checkpoint.import_foreign(
            thrice(tmp_path), MemoryStore("s"), Adoption(ties=checkpoint.parse_ties(order))
        )


def config(kind: str, *, tied: bool = True, architecture: str = "XForCausalLM") -> str:
    told = {"model_type": kind, "architectures": [architecture], "tie_word_embeddings": tied}
    return json.dumps(told)


@pytest.mark.parametrize(
    ("text", "names", "ties"),
    [
        (config("llama"), ["model.embed_tokens.weight"], {"lm_head.weight": "model.embed_tokens.weight"}),
        (config("gpt_neox"), ["gpt_neox.embed_in.weight"], {"embed_out.weight": "gpt_neox.embed_in.weight"}),
        (config("llama", tied=False), ["model.embed_tokens.weight"], {}),
        (config("llama"), ["model.embed_tokens.weight", "lm_head.weight"], {}),
        (config("qwen2", architecture="XForTokenClassification"), ["model.embed_tokens.weight"], {}),
        (config("llama"), ["embedding.weight"], {}),
    ],
)
def test_a_head_that_the_configuration_calls_tied_is_the_embeddings_other_name(text, names, ties, tmp_path):
    save_file({name: torch.ones(3, 2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    store = MemoryStore("s")
    checkpoint.import_foreign(str(tmp_path), store, Adoption())
    assert open_foreign(str(tmp_path)).about.ties == ties
    assert set(checkpoint.load(store).state["model"]) == {*names, *ties}


def test_an_order_that_shapes_do_not_show_is_asked_for_and_noted(tmp_path):
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
    optimizer = trained(net, list(net.parameters())[::-1], torch.ones(2, 4))
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    url = saved(state, tmp_path / "x.pt")
    with pytest.raises(Unsupported, match=r"0\.weight, 1\.weight, 2\.weight.*--by-order.*named_parameters"):
        checkpoint.import_foreign(url, MemoryStore("s"), Adoption())
    report = checkpoint.import_foreign(url, MemoryStore("s"), BY_ORDER)
    assert any("0.weight, 1.weight, 2.weight" in note and "order" in note for note in report.notes)


def test_an_order_that_shapes_show_needs_no_word(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    optimizer = trained(net, net.parameters(), torch.randn(5, 4))
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    report = checkpoint.import_foreign(saved(state, tmp_path / "x.pt"), MemoryStore("s"), Adoption())
    assert not report.notes


def test_names_that_an_optimizer_keeps_need_no_order(tmp_path):
    torch.manual_seed(0)
    net = Net()
    optimizer = trained(net, reversed(list(net.named_parameters())), torch.arange(6))
    url = as_torch(net, optimizer, tmp_path / "x.pt")
    assert not checkpoint.import_foreign(url, MemoryStore("s"), Adoption()).notes


def test_a_float_buffer_is_left_out_of_what_an_optimizer_numbers_if_its_shape_says_so(tmp_path):
    found = open_foreign(as_torch(*net_and_optimizer(buffer=5), tmp_path / "x.pt"))
    assert any(note.endswith("no place for them: h") for note in found.about.notes)
    net, optimizer = net_and_optimizer(buffer=4)
    found = open_foreign(as_torch(net, optimizer, tmp_path / "y.pt"))
    assert ("h", "layers.0.bias", "layers.1.bias") in found.about.doubts
    names = ["emb.weight", "layers.0.weight", "h", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    model = {name: net.state_dict()[name] for name in names}
    url = saved({"model": model, "optimizer": optimizer.state_dict()}, tmp_path / "z.pt")
    with pytest.raises(Unsupported, match=r"buffers among them.*it has h, layers\.0\.bias"):
        checkpoint.import_foreign(url, MemoryStore("s"), Adoption(numbering=checkpoint.Numbering.BY_ORDER))


def test_an_export_to_megatron_without_rules_is_proved_and_noted(tmp_path):
    net, _ = net_and_optimizer()
    store = checkpoint.open_store(str(tmp_path / "store"))
    checkpoint.import_foreign(saved(net.state_dict(), tmp_path / "x.pt"), store, Adoption())
    report = checkpoint.export_foreign(
        Whereabouts(str(tmp_path / "store")), str(tmp_path / "megatron"), Emigration("megatron")
    )
    assert any("its own names" in note for note in report.notes)
    compared = checkpoint.compare_places(
        Whereabouts(str(tmp_path / "store")), Whereabouts(str(tmp_path / "megatron"))
    )
    assert {one.verdict.value for one in compared} == {"equal"}
