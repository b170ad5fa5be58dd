"""Files of torch.save: read as torch reads them, without loading or executing them, and written for torch."""

import json
import os
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import checkpoint
from checkpoint.errors import Corrupt, Incomplete, Misuse, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.known import open_foreign
from checkpoint.store.memory import MemoryStore
from tests.foreign_samples import Given, check_same, contents_of, of_every_dtype, rewritten, some_boxes

KINDS = [True, False]  # zip, and the format before it


def save(state: Any, path: Path, *, is_zip: bool = True) -> str:
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    return str(path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.inner(self.embed(tokens)))
        return found


def trained(kind: str = "adamw") -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(1)
    net = Net()
    optimizer: torch.optim.Optimizer
    if kind == "named":
        optimizer = torch.optim.AdamW(reversed(list(net.named_parameters())))
    elif kind == "groups":
        wide = [p for p in net.parameters() if p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [{"params": wide}, {"params": [p for p in net.parameters() if p.ndim < 2]}]
        )
    elif kind == "alike":
        halves = list(net.parameters())
        optimizer = torch.optim.AdamW([{"params": halves[::2]}, {"params": halves[1::2]}])
    else:
        optimizer = torch.optim.AdamW(net.parameters())
    for step in range(2):
        net((torch.arange(6) + step) % 11).square().sum().backward()
        optimizer.step()
    return net, optimizer


def moments(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name an optimizer's states by the parameters themselves."""
    return {
        f"optimizer.{kind}.{name}": value
        for name, parameter in net.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("is_zip", KINDS)
def test_every_dtype_and_view_is_read_bit_for_bit(is_zip, tmp_path):
    base = torch.randn(6, 8)
    tensors = of_every_dtype() | {
        "view": base[2:, 1:5],
        "transposed": base.t(),
        "expanded": base[:1].expand(4, 8),
        "strided": base[::2, ::3],
        "parameter": nn.Parameter(torch.ones(3)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    check_same(contents_of(open_foreign(save(tensors, tmp_path / "x.pt", is_zip=is_zip))), tensors)


@pytest.mark.parametrize("is_zip", KINDS)
def test_any_box_of_any_view_is_read(is_zip, tmp_path):
    base = torch.randn(6, 5, 4)
    tensors = {"whole": base, "turned": base.permute(2, 0, 1), "part": base[1:4, :, ::2]}
    found = open_foreign(save(tensors, tmp_path / "x.pt", is_zip=is_zip))
    for number, tensor in enumerate(found.tensors):
        for box in some_boxes(tensor.shape, number):
            part = tensors[tensor.name][box.within(Box.whole(tensor.shape))].contiguous()
            assert found.read(number, box).tobytes() == part.numpy().tobytes()


def test_views_that_repeat_a_few_elements_are_read_as_they_are(tmp_path):
    tensors = {
        "mask": torch.arange(5).expand(1000, 5),
        "windows": torch.arange(9.0).as_strided((4, 3), (2, 1)),
        "most": torch.ones(1, dtype=torch.uint8).expand(64 << 10, 1 << 10),  # 64 MiB
        "enough": torch.arange(5 << 20, dtype=torch.uint8).expand(16, 5 << 20),  # 16 times
    }
    check_same(contents_of(open_foreign(save(tensors, tmp_path / "x.pt"))), tensors)


@pytest.mark.parametrize("is_zip", KINDS)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 36),
        torch.zeros(1).expand(1 << 20, 1 << 20, 1 << 19),
        torch.zeros(1, dtype=torch.uint8).expand((64 << 20) + 1),
        torch.zeros(5 << 20, dtype=torch.uint8).expand(17, 5 << 20),
        torch.zeros(1 << 20).as_strided((1 << 19, 1 << 19), (1, 1)),
    ],
    ids=["a row", "a cube", "above 64 MiB", "above 16 times", "overlapping"],
)
def test_views_that_repeat_beyond_reason_are_refused_before_anything_is_planned(tensor, is_zip, tmp_path):
    path = save({"model": {"w": tensor, "v": torch.ones(2)}}, tmp_path / "x.pt", is_zip=is_zip)
    with pytest.raises(Unsupported, match=r"repeats a storage of.*16 times its storage. Save it contiguous"):
        open_foreign(path)


@pytest.mark.parametrize("is_zip", KINDS)
@pytest.mark.parametrize("kind", ["adamw", "named", "groups"])
def test_states_that_an_optimizer_numbers_are_given_to_their_parameters(kind, is_zip, tmp_path):
    net, optimizer = trained(kind)
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "step": 40}
    found = open_foreign(save(state, tmp_path / "x.pt", is_zip=is_zip))
    check_same(contents_of(found), net.state_dict() | moments(net, optimizer))
    assert found.about.step == 40 and found.about.extra["epoch"] == 3
    groups = found.about.extra["optimizer"]["param_groups"]
    names = dict(net.named_parameters())
    assert sorted(name for group in groups for name in group["params"]) == sorted(names)
    assert all(group["betas"] == (0.9, 0.999) for group in groups)


def test_groups_that_shapes_do_not_tell_apart_are_not_guessed(tmp_path):
    net, optimizer = trained("alike")
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    found = open_foreign(save(state, tmp_path / "x.pt"))
    assert re.search(r"do not tell apart.*named_parameters", found.about.untold)
    assert not any(one.name.startswith("optimizer.") for one in found.tensors)


def test_the_states_of_other_parameters_are_nobody_s(tmp_path):
    net, optimizer = trained()
    state: dict[str, Any] = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    del state["model"]["inner.0.weight"]
    found = open_foreign(save(state, tmp_path / "x.pt"))
    assert "numbers 7 parameters, and the model has 6" in found.about.untold
    state["model"]["inner.0.weight"] = torch.ones(5, 5)
    assert "which would be" in open_foreign(save(state, tmp_path / "y.pt")).about.untold


def test_prefixes_of_wrappers_are_left_out_and_noted(tmp_path):
    state = {"state_dict": {"module._orig_mod.a.weight": torch.ones(2), "module.b": torch.ones(3)}}
    found = open_foreign(save(state, tmp_path / "x.pt"))
    assert [tensor.name for tensor in found.tensors] == ["a.weight", "b"]
    assert "prefixes" in found.about.notes[0]


def test_what_is_neither_model_nor_optimizer_is_kept_by_its_path(tmp_path):
    net, _ = trained()
    state = {"model": net.state_dict(), "rng": {"cpu": torch.get_rng_state()}, "lr": {"last": [1, 2.5]}}
    found = open_foreign(save(state, tmp_path / "x.pt"))
    check_same(contents_of(found), net.state_dict() | {"other.rng.cpu": state["rng"]["cpu"]})
    assert found.about.extra["lr"] == {"last": [1, 2.5]} and "rng" not in found.about.extra


def test_numbers_in_place_of_tensors_become_the_narrowest_that_holds_them(tmp_path):
    numbers = {"a": 7, "b": (1 << 24) + 1, "c": 0.5, "d": 0.1, "e": 1e300}
    state = {name: {"step": number} for name, number in numbers.items()}
    groups = [{"params": list(numbers), "lr": 0.1}]
    model = dict.fromkeys(numbers, torch.ones(1))
    whole = {"model": model, "optimizer": {"state": state, "param_groups": groups}}
    found = contents_of(open_foreign(save(whole, tmp_path / "x.pt")))
    assert {name: found[f"optimizer.step.{name}"].item() for name in numbers} == numbers
    dtypes = [found[f"optimizer.step.{name}"].dtype for name in numbers]
    assert dtypes == [torch.float32, torch.int64, torch.float32, torch.float64, torch.float64]
    state["a"]["step"] = 1 << 70
    with pytest.raises(Corrupt, match="71 bits"):
        open_foreign(save(whole, tmp_path / "y.pt"))


@pytest.mark.parametrize("kind", ["adamw", "groups"])
def test_a_training_program_goes_on_from_what_is_written(kind, tmp_path):
    net, optimizer = trained(kind)
    rng = torch.get_rng_state()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
    source = open_foreign(save(state, tmp_path / "x.pt"))
    copy = rewritten(source, "torch", tmp_path / "out")
    check_same(contents_of(copy), contents_of(source))
    assert copy.about.extra == source.about.extra
    path = tmp_path / "out" / "checkpoint.pt"
    loaded = torch.load(path, weights_only=True)
    again, other = trained(kind)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    check_same(moments(again, other), moments(net, optimizer))
    assert torch.equal(loaded["rng"], rng)
    check_same(torch.load(path, weights_only=True, mmap=True)["model"], net.state_dict())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_loads_every_dtype_that_is_written(tmp_path):
    tensors = of_every_dtype() | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    rewritten(Given(tensors, About("given", extra={"containers": {"model": []}})), "torch", tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.pt"
    check_same(torch.load(path, weights_only=True), tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_writer_holds_no_more_than_its_budget_and_a_reader_little_more_than_a_box(tmp_path):
    given = Given({"big": torch.randn(1 << 11, 1 << 11), "row": torch.randn(1 << 20)})
    copy = rewritten(given, "torch", tmp_path / "out", budget_bytes=1 << 20)
    assert given.largest_read_bytes <= 1 << 18
    tracemalloc.start()
    for row in range(0, 1 << 11, 64):
        copy.read(0, Box((row, 0), (64, 1 << 11)))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20, "of a tensor of 16 MiB"
    tracemalloc.stop()


def test_the_shards_of_an_older_hugging_face_model_are_one_model(tmp_path):
    tensors = {f"layer.{n}": torch.randn(3, n + 1) for n in range(4)}
    weight_map: dict[str, str] = {}
    for shard in range(2):
        part = {name: tensor for n, (name, tensor) in enumerate(tensors.items()) if n % 2 == shard}
        save(part, tmp_path / f"pytorch_model-{shard}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{shard}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_same(contents_of(open_foreign(str(tmp_path))), tensors)
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(Incomplete, match="pytorch_model-1"):
        open_foreign(str(tmp_path))


@pytest.mark.parametrize("is_zip", KINDS)
def test_a_file_that_was_cut_short_anywhere_is_a_clear_error(is_zip, tmp_path):
    path = tmp_path / "x.pt"
    save({"w": torch.randn(40, 30), "v": torch.ones(3)}, path, is_zip=is_zip)
    size = path.stat().st_size
    for stop in [*range(0, size, size // 40), size - 1]:
        os.truncate(path, stop)
        with pytest.raises((Corrupt, Unsupported)):
            contents_of(open_foreign(str(path)))
        save({"w": torch.randn(40, 30), "v": torch.ones(3)}, path, is_zip=is_zip)


def spoiled(path: Path, **entries: bytes | None) -> str:
    """Write a zip anew with other entries."""
    with zipfile.ZipFile(path) as archive:
        found: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    found |= {f"x/{name.replace('__', '/')}": data for name, data in entries.items()}
    path = path.with_name("spoiled.pt")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in found.items():
            if data is not None:
                archive.writestr(name, data)
    return str(path)


def test_a_zip_of_wrong_sizes_or_missing_parts_is_a_clear_error(tmp_path):
    path = tmp_path / "x.pt"
    save({"w": torch.randn(4, 3)}, path)
    for entries, said in (
        ({"data__0": bytes(47)}, "47 bytes instead of 48"),
        ({"data__0": bytes(49)}, "49 bytes instead of 48"),
        ({"data__0": None}, "lacks data/0"),
        ({"byteorder": b"big"}, "other way around"),
        ({"constants.pkl": b"x"}, "TorchScript"),
        ({"data.pkl": None}, "not of torch.save"),
    ):
        with pytest.raises((Corrupt, Unsupported), match=said):
            contents_of(open_foreign(spoiled(path, **entries)))


def test_a_compressed_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"x" * 1000)
    with pytest.raises(Unsupported, match="compressed"):
        open_foreign(str(tmp_path / "x.pt"))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_a_file_cannot_hold_whole_are_refused_by_what_they_are(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    conjugated = torch.ones(2, dtype=torch.complex64).conj()
    for name, tensor in (("q", quantized), ("s", torch.eye(2).to_sparse()), ("c", conjugated)):
        with pytest.raises((Unsupported, Corrupt)):
            open_foreign(save({"w": tensor}, tmp_path / f"{name}.pt"))


def test_which_of_several_files_is_meant_has_to_be_said(tmp_path):
    for name in ("a.pt", "b.pt"):
        save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(Unsupported, match="give the path of one"):
        open_foreign(str(tmp_path), "torch")
    assert len(open_foreign(str(tmp_path / "a.pt")).tensors) == 1


def test_a_file_is_known_by_its_content_whatever_it_is_called(tmp_path):
    save({"w": torch.ones(1)}, tmp_path / "consolidated.00")
    assert open_foreign(str(tmp_path / "consolidated.00"), "torch").about.format == "torch"
    (tmp_path / "x.pt").write_bytes(b"hello")
    with pytest.raises(Corrupt, match="neither a zip"):
        open_foreign(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("is_flat", [False, True])
def test_an_optimizer_that_calls_its_parameters_by_names_still_does(tmp_path, is_flat):
    """As `get_state_dict(full_state_dict=True)` of torch saves it, and `set_state_dict` takes it."""
    net, optimizer = trained()
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=is_flat)
    model, states = get_state_dict(net, optimizer, options=options)
    url = save({"model": model, "optimizer": states}, tmp_path / "x.pt")
    store = checkpoint.open_store(str(tmp_path / "store"))
    checkpoint.import_foreign(url, store, checkpoint.Adoption())
    target = tmp_path / "out"
    plan = checkpoint.Emigration("torch")
    checkpoint.export_foreign(checkpoint.Whereabouts(str(tmp_path / "store")), str(target), plan)
    back = torch.load(target / "checkpoint.pt", weights_only=True)
    assert back["optimizer"].keys() == states.keys()
    if is_flat:  # torch 2.13 itself does not take these back in a world of one
        tensors: dict[str, Any] = {name: item for name, item in states.items() if name.startswith("state.")}
        assert all(torch.equal(item, back["optimizer"][name]) for name, item in tensors.items())
        return
    other, fresh = trained()
    told = {"model_state_dict": back["model"], "optim_state_dict": back["optimizer"]}
    set_state_dict(other, fresh, **told, options=options)
    before, after = (one.state_dict()["state"].values() for one in (optimizer, fresh))
    for one, same in zip(before, after, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)


def test_layers_and_experts_of_numbers_beyond_reason_take_no_memory(tmp_path):
    for name, to in (("layers.99999999999.w", "pipeline=2"), ("layers.0.experts.99999999999.w", "expert=2")):
        names = (name.replace("9" * 11, "0"), name, "embed.w")
        url = save({"model": {each: torch.ones(2, 2) for each in names}}, tmp_path / "x.pt")
        store = MemoryStore(to)
        checkpoint.import_foreign(url, store, checkpoint.Adoption())
        with pytest.raises(Misuse, match=r"has 100000000000 (layers|experts)"):
            checkpoint.plan_reshard(store, MemoryStore("t"), checkpoint.Change(to))
