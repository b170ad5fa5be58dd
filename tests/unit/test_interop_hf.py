"""Hugging Face models: what safetensors writes we read, what we write it reads, and what lies is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint.errors import AlreadyExists, CheckpointError, Corrupt, Incomplete, Misuse, Unsupported
from checkpoint.format.box import Box
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.hf_config import rules_for, sizes_from
from checkpoint.interop.formats.known import open_foreign
from checkpoint.interop.placing import resolve_sizes
from checkpoint.store.memory import MemoryStore
from tests.foreign_samples import Given, check_same, contents_of, of_every_dtype, rewritten, some_boxes

NOT_THERE = ("complex32", "complex128")

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 3, "n_embd": 12, "n_inner": None, "vocab_size": 50, "n_positions": 16},
    "gpt_neox": {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_size": 12,
        "intermediate_size": 40,
        "vocab_size": 50,
        "tie_word_embeddings": False,
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 40,
        "vocab_size": 50,
    },
    "qwen2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 16,
        "intermediate_size": 40,
        "vocab_size": 50,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_local_experts": 4,
        "vocab_size": 50,
    },
}


def model(num_tensors: int = 6) -> dict[str, torch.Tensor]:
    return {f"layers.{n}.weight": torch.randn(7, 5 + n) for n in range(num_tensors)}


def sharded(path: Path, tensors: dict[str, torch.Tensor], num_shards: int = 3) -> Path:
    """Write a model as transformers does: shards, an index, a configuration, a tokenizer."""
    path.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {key: tensor for n, (key, tensor) in enumerate(tensors.items()) if n % num_shards == shard}
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIGS["llama"]}))
    (path / "tokenizer.model").write_bytes(b"\x00\xfftokens")
    return path


def test_every_dtype_that_safetensors_writes_is_read_bit_for_bit(tmp_path):
    tensors = of_every_dtype(but=NOT_THERE) | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_same(contents_of(open_foreign(str(tmp_path))), tensors)


def test_safetensors_reads_what_is_written_of_every_dtype(tmp_path):
    tensors = of_every_dtype(but=NOT_THERE) | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    check_same(contents_of(rewritten(Given(tensors), "hf", tmp_path / "out")), tensors)
    check_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.parametrize("dtype", NOT_THERE)
def test_a_dtype_that_safetensors_lacks_is_refused_by_name(dtype, tmp_path):
    with pytest.raises(Unsupported, match=f"of.{dtype}.*cast it"):
        rewritten(Given({f"of.{dtype}": of_every_dtype()[f"of.{dtype}"]}), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_read_by_their_index_with_the_configuration_and_the_tokenizer(tmp_path):
    tensors = model()
    found = open_foreign(str(sharded(tmp_path / "model", tensors)))
    check_same(contents_of(found), tensors)
    assert found.about.format == "hf" and found.about.axes == {}
    assert found.about.extra["config"]["model_type"] == "llama" and found.about.sizes["kv_heads"] == 2
    assert found.about.extra["files"]["tokenizer.model"] == b"\x00\xfftokens"


def test_a_box_is_read_without_the_rest(tmp_path):
    tensors = {"w": torch.randn(6, 5, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_foreign(str(tmp_path))
    for box in some_boxes((6, 5, 4)):
        expected = tensors["w"][box.within(Box.whole((6, 5, 4)))].contiguous()
        assert found.read(0, box).tobytes() == expected.numpy().tobytes()


def test_what_was_read_is_written_again_in_shards_with_everything_beside_it(tmp_path):
    tensors = model()
    source = open_foreign(str(sharded(tmp_path / "model", tensors)))
    extra = {**source.about.extra, "max_shard_bytes": 400}
    copy = rewritten(Given(tensors, About("hf", extra=extra)), "hf", tmp_path / "out")
    check_same(contents_of(copy), tensors)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    loaded = {key: one for name in names for key, one in load_file(tmp_path / "out" / name).items()}
    check_same(loaded, tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_changed_configuration_is_written_as_it_is_now(tmp_path):
    source = open_foreign(str(sharded(tmp_path / "model", model())))
    config = {**source.about.extra["config"], "vocab_size": 64}
    about = About("hf", extra={**source.about.extra, "config": config})
    rewritten(Given(model(), about), "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 64


def test_a_writer_holds_no_more_than_its_budget(tmp_path):
    given = Given({"big": torch.randn(1 << 10, 1 << 10), "row": torch.randn(1 << 20)})
    rewritten(given, "hf", tmp_path / "out", budget_bytes=1 << 20)
    assert given.largest_read_bytes <= 1 << 18


def test_a_model_has_no_room_for_an_optimizer(tmp_path):
    with pytest.raises(Unsupported, match=r"optimizer\.exp_avg\.w.*leave it out"):
        rewritten(Given({"optimizer.exp_avg.w": torch.ones(2)}), "hf", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    rewritten(Given(model()), "hf", tmp_path / "out")
    with pytest.raises(AlreadyExists):
        rewritten(Given(model()), "hf", tmp_path / "out")


def test_parts_that_torch_wrote_for_each_rank_are_put_together(tmp_path):
    whole = torch.randn(7, 4)
    for rank, (start, part) in enumerate(((0, whole[:4]), (4, whole[4:]))):
        told = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [start, 0]}}), "DCP_VERSION": "1.0"}
        save_file(
            {"w": part.contiguous()},
            tmp_path / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors",
            metadata=told,
        )
    found = open_foreign(str(tmp_path))
    check_same(contents_of(found), {"w": whole})
    assert "how many there were" in found.about.notes[0]
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(Incomplete, match="rank's file missing"):
        open_foreign(str(tmp_path))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_sizes_of_a_configuration_are_all_that_its_rules_ask_for(kind):
    config = {"model_type": kind, **CONFIGS[kind]}
    name = rules_for(config)
    assert name is not None
    sizes = resolve_sizes(builtin_rules(name), sizes_from(config))
    assert sizes["hidden"] in (12, 16) and sizes["layers"] == 2 and sizes["vocab"] == 50
    assert bool(sizes["tied"]) == (kind in ("gpt2", "qwen2"))
    if kind == "qwen2":
        assert (sizes["head_dim"], sizes["qkv_bias"]) == (8, 1)
    if kind == "gpt2":
        assert (sizes["inner"], sizes["positions"]) == (48, 16)


def test_an_unknown_model_tells_no_sizes_and_has_no_rules():
    assert sizes_from({"model_type": "rwkv", "n_layer": 2}) == {} and rules_for({}) is None


def header(tensors: dict[str, Any], data: bytes = bytes(16)) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, stop: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "an absurd header": (99_000_000).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "no object": (2).to_bytes(8, "little") + b"[]",
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "millions of lists": (9_000_000).to_bytes(8, "little") + b"[" + b"[]," * 2_999_999 + b"0]",
    "overlapping": header({"a": entry(0, 8), "b": entry(4, 12)}),
    "with a gap": header({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "ending early": header({"a": entry(0, 8)}),
    "ending beyond the file": header({"a": entry(0, 8), "b": entry(8, 16)}, bytes(12)),
    "of another size than its shape": header({"a": entry(0, 8, (3,)), "b": entry(8, 16)}),
    "of negative shape": header({"a": entry(0, 16, (-2, -2))}),
    "of absurd shape": header({"a": entry(0, 16, (1 << 62, 1 << 62))}),
    "of absurd shape with a zero": header({"a": entry(0, 0, (1 << 62, 1 << 62, 0)), "b": entry(0, 16, (4,))}),
    "of a hundred dims": header({"a": entry(0, 4, (1,) * 100), "b": entry(4, 16, (3,))}),
    "of float shape": header({"a": entry(0, 16, (2.0, 2))}),
    "of unknown dtype": header({"a": entry(0, 16, (4,), "F33")}),
    "of no dtype": header({"a": entry(0, 16, (4,), ["F32"])}),
    "at negative offsets": header({"a": entry(-8, 8, (4,))}),
    "backwards": header({"a": entry(16, 0, (4,))}),
    "not described": header({"a": 3}),
    "with more fields": header({"a": {**entry(0, 16, (4,)), "x": 1}}),
    "twice": header({"a": entry(0, 8), "b": entry(8, 16)}).replace(b'"b"', b'"a"'),
    "with odd metadata": header({"__metadata__": {"format": 3}, "a": entry(0, 16, (4,))}),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_hostile_header_is_a_clear_error(what, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[what])
    with pytest.raises((Corrupt, Unsupported), match=r"model\.safetensors"):
        open_foreign(str(tmp_path))


def spoil_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def remove(path: Path, *names: str) -> list[str]:
    for name in names:
        (path / name).unlink()
    return [*names]


def swap_files(path: Path) -> int:
    return (path / "model-00002-of-00003.safetensors").write_bytes(
        (path / "model-00001-of-00003.safetensors").read_bytes()
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "00002"),
    "a shard that is another's copy": (swap_files, "lacks|otherwise"),
    "a shard outside": (
        spoil_index(lambda names: names.update({"layers.1.weight": "../secret.safetensors"})),
        "outside",
    ),
    "an absolute shard": (
        spoil_index(lambda names: names.update({"layers.1.weight": "/etc/passwd"})),
        "outside",
    ),
    "a shard that is no text": (spoil_index(lambda names: names.update({"layers.1.weight": 3})), "outside"),
    "a name that no shard has": (
        spoil_index(lambda names: names.update({"x": "model-00001-of-00003.safetensors"})),
        "'x'",
    ),
    "a name too few": (spoil_index(lambda names: names.pop("layers.1.weight")), r"layers\.1\.weight"),
    "an empty index": (spoil_index(lambda names: names.clear()), "weight_map"),
    "no index and a missing shard": (
        lambda path: remove(path, "model.safetensors.index.json", "model-00003-of-00003.safetensors"),
        "of 3 shards",
    ),
    "no index and a doubled shard": (
        lambda path: (remove(path, "model.safetensors.index.json"), swap_files(path)),
        "several files",
    ),
    "two indices": (lambda path: (path / "x.safetensors.index.json").write_text("{}"), "several indices"),
    "an index that is no JSON": (
        lambda path: (path / "model.safetensors.index.json").write_text("{"),
        "no sound JSON",
    ),
    "a configuration that is no JSON": (lambda path: (path / "config.json").write_text("{"), "config"),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_a_damaged_directory_is_a_clear_error(what, tmp_path):
    damage, said = DAMAGE[what]
    path = sharded(tmp_path / "model", model())
    damage(path)
    with pytest.raises((Corrupt, Incomplete), match=said):
        open_foreign(str(path))


def test_no_index_is_needed_if_all_shards_are_there(tmp_path):
    tensors = model()
    path = sharded(tmp_path / "model", tensors)
    (path / "model.safetensors.index.json").unlink()
    check_same(contents_of(open_foreign(str(path))), tensors)


def test_what_looks_like_nothing_known_says_what_is_known_and_what_was_seen(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(Unsupported, match=r"deepspeed, dcp, hf, torch.*readme\.md"):
        open_foreign(str(tmp_path))
    with pytest.raises(Unsupported, match="no format 'gguf'"):
        open_foreign(str(tmp_path), "gguf")
    with pytest.raises(CheckpointError, match="no safetensors"):
        open_foreign(str(tmp_path), "hf")


@pytest.mark.parametrize("layers", [10**9, 10**40])
def test_a_configuration_of_more_layers_than_there_can_be_takes_no_memory(layers, tmp_path):
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", **CONFIGS["llama"], "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = checkpoint.Adoption(rules=checkpoint.choose_rules("llama-hf", []))
    with pytest.raises(Misuse, match=f"'layers': {layers}.* has {layers} tensors"):
        checkpoint.plan_import_foreign(str(tmp_path), MemoryStore("s"), plan)
