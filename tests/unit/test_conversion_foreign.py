"""Import and export through the contract of foreign formats: both ways, bit for bit, proved, restorable."""

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint.errors import AlreadyExists, FormatError, Mismatch, Misuse
from checkpoint.format.box import Box
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.emigrating import Emigration, plan_emigration
from checkpoint.interop.conversion.exporting import export_checkpoint
from checkpoint.interop.conversion.importing import Adoption, import_checkpoint
from checkpoint.interop.conversion.names import from_foreign, from_rules, rule_name, to_foreign
from checkpoint.interop.conversion.origins import stored_origin
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.interop.conversion.ruled import RuleChoice, choose_rules
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.conversion.tying import parse_ties
from checkpoint.interop.formats.contract import About
from checkpoint.interop.moves import Foreign
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of, save_state
from tests.interop_samples import LLAMA, foreign, llama, megatron_llama, slices


class InMemory:
    """A foreign checkpoint of arrays of bits."""

    def __init__(self, shards, about=None) -> None:
        self.about = about or About("memory", {})
        self.tensors = [tensor for tensor, _ in shards]
        self.arrays = [array for _, array in shards]

    def read(self, number, box):
        return np.array(self.arrays[number][slices(box)])

    def settle(self):
        pass


def written(contents) -> InMemory:
    """Read all that an export writes."""
    arrays = [contents.read(n, Box.whole(one.shape)) for n, one in enumerate(contents.tensors)]
    return InMemory(list(zip(contents.tensors, arrays, strict=True)), contents.about)


def export(store, emigration, *, holds=True):
    """Export to memory; return the report and what was written."""
    outward = plan_emigration(stored_origin(Stored(store)), emigration, lambda format: holds)
    kept: list[InMemory] = []
    report = export_checkpoint(
        outward, "memory:", lambda contents: kept.append(written(contents)), lambda: kept[0]
    )
    return report, kept[0]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().reshape(tensor.shape).view(torch.int32).numpy().view("<u4")


def plain(name: str, tensor: torch.Tensor):
    return Foreign(name, "float32", tuple(tensor.shape)), bits(tensor)


@pytest.fixture
def trained():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def as_foreign(model, optimizer) -> InMemory:
    names = [name for name, _ in model.named_parameters()]
    shards = [plain(name, weight) for name, weight in model.state_dict().items()]
    for name, parameter in model.named_parameters():
        shards += [plain(f"optimizer.{kind}.{name}", one) for kind, one in optimizer.state[parameter].items()]
    shards.append(plain("other.schedule.best", torch.tensor([2.0, 3.0])))
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    plain_state = {names[0]: {"kind": "adam"}}
    optimizer_extra = {"param_groups": [{**group, "params": names}], "state": plain_state}
    extra = {"optimizer": optimizer_extra, "config": {"width": 8}, "files": {"a.json": b"{}"}}
    return InMemory(shards, About("memory", {}, step=12, extra=extra, notes=("a note",)))


def test_an_imported_training_is_restored_by_a_checkpointer(trained, tmp_path):
    model, optimizer = trained
    url = str(tmp_path / "store")
    report = import_checkpoint(
        as_foreign(model, optimizer), "memory:", checkpoint.open_store(url), Adoption()
    )
    assert report.step == 12
    assert report.notes == ("a note",)
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    other = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 5))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    with checkpoint.Checkpointer(url) as checkpointer:
        restored = checkpointer.restore({"model": other, "optimizer": fresh})
    assert restored is not None and restored.step == 12
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert fresh.param_groups[0]["lr"] == 0.01


def test_what_was_imported_is_exported_bit_for_bit_with_all_that_is_no_tensor(trained):
    store, source = MemoryStore("s"), as_foreign(*trained)
    import_checkpoint(source, "memory:", store, Adoption())
    report, back = export(store, Emigration("memory"))
    assert [one.name for one in back.tensors] == [one.name for one in source.tensors]
    assert all((a == b).all() for a, b in zip(source.arrays, back.arrays, strict=True))
    assert back.about.extra == {**source.about.extra, "step": 12}
    assert back.about.step == 12
    assert len(report.proofs) == len(source.tensors)


def test_a_format_without_an_optimizer_gets_the_model_and_a_note(trained):
    store = MemoryStore("s")
    import_checkpoint(as_foreign(*trained), "memory:", store, Adoption())
    report, back = export(store, Emigration("hf", dtype="bf16"), holds=False)
    assert {one.dtype for one in back.tensors} == {"bfloat16"}
    assert len(back.tensors) == 3
    assert "left out" in report.notes[0]
    assert {proof.how for proof in report.proofs} == {"reference"}


@pytest.mark.parametrize(
    ("format", "layout", "axes"),
    [
        ("hf", "tensor=2", "tensor"),
        ("megatron", "pipeline=2,tensor=2", "pipeline, tensor"),
        ("deepspeed", "tensor=2,replica=2,zero=2", "tensor"),
        ("deepspeed", "replica=4", "replica"),
        ("dcp", "shard=2", "shard"),
        ("deepspeed", "replica=2,zero=1,align=8", "align"),
        ("torch", "replica=2,zero=3", "replica, zero"),
    ],
)
def test_a_layout_that_an_export_would_not_keep_is_refused(trained, format, layout, axes):
    store = MemoryStore("s")
    import_checkpoint(as_foreign(*trained), "memory:", store, Adoption())
    with pytest.raises(
        Misuse, match=f"an export to {format} cannot be divided by {axes}, as '{layout}' asks"
    ):
        export(store, Emigration(format, to=layout))


@pytest.mark.parametrize("format", ["megatron-dist", "deepspeed", "deepspeed-universal"])
def test_weights_are_not_cast_beside_masters_that_round_to_something_else(format):
    weight = torch.randn(4, 3).to(torch.bfloat16)
    names = {"w": ("bfloat16", weight.view(torch.int16).numpy().view("<u2"))}
    names["optimizer.master.w"] = ("float32", bits(weight.float()))
    shards = [(Foreign(name, dtype, (4, 3)), array) for name, (dtype, array) in names.items()]
    store = MemoryStore("s")
    import_checkpoint(InMemory(shards, About("memory")), "memory:", store, Adoption())
    with pytest.raises(
        Misuse, match="model/w cannot become float16 beside its fp32 master, which rounds to b"
    ):
        export(store, Emigration(format, dtype="fp16"))
    for fine in (Emigration(format, dtype="bf16"), Emigration(format, dtype="fp16", only="model/*")):
        export(store, fine)


@pytest.mark.parametrize("layout", ["replica=1", "shard=2,tensor=3", "pipeline=2,tensor=3"])
def test_a_llama_of_megatron_comes_in_by_rules_and_goes_out_to_other_ranks(layout):
    weights = llama()
    shards = megatron_llama(weights, (1, 2), (3, 1))
    about = About("memory", {"tensor": 2, "pipeline": 2}, sizes={"layers": 4, "unknown": 3})
    sizes = {**LLAMA, "kv_heads": (1, 2), "inner": 12, "layers": (3, 1)}
    store = MemoryStore("s")
    choice = RuleChoice(builtin_rules("llama-megatron"), sizes)
    report = import_checkpoint(InMemory(shards, about), "memory:", store, Adoption(rules=choice))
    assert report.num_tensors == len(weights)
    state = checkpoint.load(store).state["model"]
    for name, array in weights.items():
        assert (bits(state[name]) == array).all(), name

    other = RuleChoice(builtin_rules("llama-megatron"), LLAMA)
    moved = MemoryStore("moved")
    reshard(store, moved, Change(to=layout, rules=other))
    assert bits_of(moved) == bits_of(store)
    _, back = export(moved, Emigration("memory", to="tensor=3,pipeline=2", rules=other))
    expected = {
        (one.name, one.at["tensor"], one.at["pipeline"]): array
        for one, array in megatron_llama(weights, (1, 1, 1), (2, 2))
    }
    found = {
        (one.name, one.at["tensor"], one.at["pipeline"]): array
        for one, array in zip(back.tensors, back.arrays, strict=True)
    }
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        real = 3 if "word_embeddings" in key[0] or "output_layer" in key[0] else len(array)
        real = min(real, 11 - 4 * key[1]) if real == 3 else real  # the last row of the last rank is padding
        assert (found[key][:real] == array[:real]).all(), key


def test_rules_tell_a_layout_how_heads_are_divided():
    store, moved = MemoryStore("s"), MemoryStore("moved")
    shards = [foreign(name, array) for name, array in llama().items()]
    import_checkpoint(InMemory(shards), "memory:", store, Adoption())
    uneven = RuleChoice(builtin_rules("llama-megatron"), {**LLAMA, "kv_heads": (2, 1), "inner": (7, 5)})
    reshard(store, moved, Change(to="tensor=2", rules=uneven))
    stored = Stored(moved)
    number = [one.name for one in stored.tensors].index("model/layers.0.attention.q.weight")
    assert {one.box.size for one in stored.table if one.tensor == number} == {(8, 10), (4, 10)}
    number = [one.name for one in stored.tensors].index("model/layers.0.mlp.down.weight")
    assert {one.box.size for one in stored.table if one.tensor == number} == {(10, 7), (10, 5)}


# ------------------------------------------------------------------------------------------- refused


def test_spread_tensors_without_rules_are_refused():
    shards = megatron_llama(llama(), (1, 2), (4,))
    source = InMemory(shards, About("memory", {"tensor": 2, "pipeline": 1}))
    with pytest.raises(FormatError, match="name the rules of its model"):
        import_checkpoint(source, "memory:", MemoryStore("s"), Adoption())


def test_a_step_that_is_there_is_not_overwritten(trained):
    store = MemoryStore("s")
    import_checkpoint(as_foreign(*trained), "memory:", store, Adoption())
    with pytest.raises(AlreadyExists, match="a checkpoint of step 12"):
        import_checkpoint(as_foreign(*trained), "memory:", store, Adoption())


class Lying(InMemory):
    """Gives other bits the second time that it is asked for them, as a file that changes does."""

    def __init__(self, inner: InMemory, name: str) -> None:
        super().__init__(list(zip(inner.tensors, inner.arrays, strict=True)), inner.about)
        self.name, self.num_reads = name, 0

    def read(self, number, box):
        found = super().read(number, box).copy()
        if self.tensors[number].name == self.name:
            self.num_reads += 1
            if self.num_reads == 1:
                found.reshape(-1)[0] ^= 1
        return found


def test_a_flipped_bit_on_the_way_in_is_caught_and_the_next_attempt_begins_anew(trained):
    store, source = MemoryStore("s"), as_foreign(*trained)
    with pytest.raises(Mismatch, match=r"model/1\.weight"):
        import_checkpoint(Lying(source, "1.weight"), "memory:", store, Adoption())
    assert checkpoint.Catalog(store).steps() == []
    assert import_checkpoint(source, "memory:", store, Adoption()).num_resumed_bytes == 0


def test_a_flipped_bit_on_the_way_out_is_caught(trained):
    store = MemoryStore("s")
    import_checkpoint(as_foreign(*trained), "memory:", store, Adoption())
    outward = plan_emigration(stored_origin(Stored(store)), Emigration("memory"), lambda format: True)
    kept: list[InMemory] = []

    def spoiled():
        kept[0].arrays[0] = kept[0].arrays[0] ^ np.uint32(1)
        return kept[0]

    with pytest.raises(Mismatch, match=r"differ from the source's: \['model/0\.weight'\]"):
        export_checkpoint(outward, "memory:", lambda contents: kept.append(written(contents)), spoiled)


def test_what_lies_beside_model_and_optimizer_comes_back_where_it_was():
    state = {
        "model": {"w": torch.ones(3)},
        "loop": {"cursor": [1, 2], "rng": {"cpu": torch.arange(4)}, "note": None},
        "schedule": {"lr": (0.1, 0.2)},
    }
    store, again = MemoryStore("s"), MemoryStore("again")
    save_state(store, state)
    _, back = export(store, Emigration("memory"))
    assert back.about.extra == {
        "step": 3,
        "loop": {"cursor": [1, 2], "note": None},
        "schedule": {"lr": (0.1, 0.2)},
    }
    import_checkpoint(back, "memory:", again, Adoption())
    assert bits_of(again) == bits_of(store)
    loaded = checkpoint.load(again).state
    assert loaded["loop"]["cursor"] == [1, 2] and loaded["schedule"] == state["schedule"]


class Tied(torch.nn.Module):
    """A model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("names", [("embed.weight",), ("embed.weight", "head.weight")])
def test_a_tied_weight_kept_once_or_twice_is_one_here(names, tmp_path):
    model, other, url = Tied(), Tied(), str(tmp_path / "store")
    source = InMemory([plain(name, model.embed.weight) for name in names])
    ties = parse_ties(["head.weight=embed.weight"])
    report = import_checkpoint(source, "memory:", checkpoint.open_store(url), Adoption(ties=ties))
    assert report.num_tensors == 1
    with checkpoint.Checkpointer(url) as checkpointer:
        checkpointer.restore({"model": other})
    assert torch.equal(model.embed.weight, other.head.weight)
    _, back = export(checkpoint.open_store(url), Emigration("memory"))
    assert [one.name for one in back.tensors] == ["embed.weight", "head.weight"], "as a state_dict has them"
    assert (back.arrays[0] == back.arrays[1]).all()
    again = MemoryStore("again")
    assert import_checkpoint(back, "memory:", again, Adoption()).num_tensors == 1, "what we export tells"


def test_weights_that_differ_are_not_tied():
    shards = [plain("a", torch.ones(3)), plain("b", torch.zeros(3)), plain("c", torch.ones(4))]
    for ties, error, words in [
        ({"b": "a"}, Mismatch, "differ"),
        ({"c": "a"}, Mismatch, "type or shape"),
        ({"b": "z"}, FormatError, "'z': there is no weight"),
    ]:
        with pytest.raises(error, match=words):
            import_checkpoint(InMemory(shards), "memory:", MemoryStore("s"), Adoption(ties=ties))
    with pytest.raises(FormatError, match="ties nothing"):
        parse_ties(["a"])
    with pytest.raises(FormatError, match="ties what is no weight"):
        parse_ties(["optimizer.x=a"])


def test_an_optimizer_without_groups_gets_one_of_all_its_parameters():
    store = MemoryStore("s")
    shards = [plain(name, torch.ones(2)) for name in ("a", "b", "optimizer.exp_avg.a", "optimizer.exp_avg.b")]
    import_checkpoint(InMemory(shards), "memory:", store, Adoption())
    assert checkpoint.load(store).state["optimizer"]["param_groups"] == [{"params": ["a", "b"]}]


@pytest.mark.parametrize("name", ["a.b.weight", "optimizer.exp_avg.a.b.weight", "other.rng.cuda/0"])
def test_names_go_there_and_back(name):
    assert to_foreign(from_foreign(name)) == name


def test_rules_and_checkpointers_call_states_differently():
    assert from_rules("optimizer/exp_avg/a.b") == "optimizer/state/a.b/exp_avg"
    assert rule_name("optimizer/state/a.b/exp_avg") == "optimizer/exp_avg/a.b"


def test_rules_are_chosen_by_name_or_file_with_sizes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rules: 1\nname: mine\nmap:\n  - {from: '{any:.*}', to: '{any}'}\n")
    assert choose_rules(str(path)).rules.name == "mine"
    assert choose_rules("llama-hf", ["layers=2", "kv_heads=3,2"]).sizes == {"layers": 2, "kv_heads": (3, 2)}
    with pytest.raises(FormatError, match="neither a file nor a built-in rule set; there are gpt-megatron"):
        choose_rules("nothing")
    with pytest.raises(FormatError, match="'layers' is no size"):
        choose_rules("llama-hf", ["layers"])
