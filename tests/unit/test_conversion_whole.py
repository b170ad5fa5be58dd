"""What was written counts if it is all that it should be: by the rules' words, and not by the plan."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint.errors import Mismatch
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.conversion.outbound import Outbound
from checkpoint.interop.conversion.ruled import choose_rules
from checkpoint.interop.formats import known
from checkpoint.interop.formats.hf import write_hf
from checkpoint.interop.formats.safetensors import header_bytes
from checkpoint.interop.moves import Foreign, Plan
from checkpoint.interop.naming import Model
from checkpoint.interop.placing import resolve_sizes
from checkpoint.interop.rules import declared_shapes
from checkpoint.interop.writing import plan_export
from tests.conversion_samples import save_state

EMIGRATING = "checkpoint.interop.conversion.emigrating"
NORM, DOWN = "decoder.final_layernorm.weight", "mlp.linear_fc2.weight"
LLAMA = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 16, "inner": 24, "vocab": 50}


def llama_weights() -> dict[str, torch.Tensor]:
    """Return the weights of a small model by the names that the rules give them."""
    torch.manual_seed(3)
    rules = builtin_rules("llama-megatron")
    shapes = declared_shapes(Model(rules, resolve_sizes(rules, LLAMA), {}))
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("whole") / "store")
    save_state(checkpoint.open_store(url), {"model": llama_weights()})
    return url


def to_megatron(source: str, target: Path) -> checkpoint.ConversionReport:
    rules = choose_rules(
        "llama-megatron", [f"{name}={size}" for name, size in (LLAMA | {"padded_vocab": 52}).items()]
    )
    return export_foreign(
        Whereabouts(source), str(target), Emigration("megatron", "tensor=2,pipeline=2", rules)
    )


def number_of(plan: Plan, name: str, tensor: int) -> int:
    return next(
        n for n, one in enumerate(plan.foreign) if one.name.endswith(name) and one.at["tensor"] == tensor
    )


def without(name: str, tensor: int) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        gone = number_of(plan, name, tensor)
        foreign = tuple(one for number, one in enumerate(plan.foreign) if number != gone)
        left = [move for move in plan.moves if move.source != gone]
        moves = tuple(replace(move, source=move.source - (move.source > gone)) for move in left)
        return replace(plan, foreign=foreign, moves=moves)

    return change


def changed(name: str, change: Callable[[Foreign], Foreign], ranks=(0, 1)) -> Callable[[Plan], Plan]:
    return lambda plan: replace(
        plan,
        foreign=tuple(
            change(one) if one.name.endswith(name) and one.at["tensor"] in ranks else one
            for one in plan.foreign
        ),
    )


def longer(one: Foreign) -> Foreign:
    return replace(one, shape=(one.shape[0] + 1, *one.shape[1:]))


WRONG = {
    "a copy that one rank lacks": without(NORM, 1),
    "a copy that the other rank lacks": without(NORM, 0),
    "a part that one rank lacks": without(DOWN, 1),
    "one row too many on all ranks": changed(DOWN, longer),
    "one row too many on the first rank": changed(DOWN, longer, (0,)),
    "one row too many on the last rank": changed(DOWN, longer, (1,)),
    "one fused row too many": changed("self_attention.linear_qkv.weight", longer),
    "one fused row of two too many": changed("mlp.linear_fc1.weight", longer),
    "more padding than asked for": changed("embedding.word_embeddings.weight", longer),
    "another dtype on one rank": changed(DOWN, lambda one: replace(one, dtype="float64"), (1,)),
    "another dtype on all ranks": changed(DOWN, lambda one: replace(one, dtype="float64")),
    "another name": changed(NORM, lambda one: replace(one, name="decoder.final_layernorm.bias")),
}


def test_a_sound_export_by_rules_is_proved_whole(source, tmp_path):
    assert len(to_megatron(source, tmp_path / "out").proofs) == len(llama_weights())


@pytest.mark.parametrize("wrong", WRONG)
def test_an_export_by_a_wrong_plan_never_appears(source, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(f"{EMIGRATING}.plan_export", lambda *given: WRONG[wrong](plan_export(*given)))
    with pytest.raises(Mismatch):
        to_megatron(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_padding_that_is_not_written_as_zeros_is_refused(source, tmp_path, monkeypatch):
    read = Outbound.filled

    def with_noise(outbound, number, box, num_threads):
        found, one = read(outbound, number, box, num_threads), outbound.tensors[number]
        if "word_embeddings" in one.name and one.at["tensor"] == 1 and box.stop[0] == one.shape[0]:
            found = found.copy()
            found[-1] = 0x7FC00000
        return found

    monkeypatch.setattr(Outbound, "filled", with_noise)
    with pytest.raises(Mismatch, match=r"padding that was written of .*embedding.* is not zero"):
        to_megatron(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- without rules


@pytest.fixture(params=["from a store", "from a foreign checkpoint"])
def plain(request, tmp_path) -> str:
    store = str(tmp_path / "store")
    save_state(
        checkpoint.open_store(store),
        {"model": {"a": torch.randn(6, 4, dtype=torch.bfloat16), "b": torch.randn(5)}},
    )
    if request.param == "from a store":
        return store
    export_foreign(Whereabouts(store), str(tmp_path / "source"), Emigration("torch"))
    return str(tmp_path / "source")


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float16"}, {"dtype": "int16"}, {"shape": (4, 6)}, {"shape": (24,)}, {"name": "c"}],
    ids=str,
)
def test_a_file_that_calls_the_right_bytes_something_else_is_refused(plain, tmp_path, monkeypatch, change):
    monkeypatch.setattr(
        "checkpoint.interop.formats.hf.header_bytes",
        lambda tensors, *rest: header_bytes(
            [replace(one, **change) if one.name == "a" else one for one in tensors], *rest
        ),
    )
    with pytest.raises(Mismatch, match="is not left there"):
        export_foreign(Whereabouts(plain), str(tmp_path / "out"), Emigration("hf"))
    assert not (tmp_path / "out").exists()


class Extra:
    """Contents, and one tensor more: the first by another name."""

    def __init__(self, inner) -> None:
        self.about, self._inner = inner.about, inner
        self.tensors = [*inner.tensors, replace(inner.tensors[0], name="zzz.extra")]

    def read(self, number, box):
        return self._inner.read(number % len(self._inner.tensors), box)


def test_a_tensor_that_nobody_asked_for_is_refused(plain, tmp_path, monkeypatch):
    told = replace(
        known.FORMATS["hf"], write=lambda draft, contents, most: write_hf(draft, Extra(contents), most)
    )
    monkeypatch.setitem(known.FORMATS, "hf", told)
    with pytest.raises(Mismatch, match=r"zzz\.extra"):
        export_foreign(Whereabouts(plain), str(tmp_path / "out"), Emigration("hf"))
    assert not (tmp_path / "out").exists()
