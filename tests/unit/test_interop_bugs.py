"""Bugs that real converters had and that pass checks of shapes, counts and norms: each is caught here.

Each is put into a copy of the plan that a conversion then follows, or into the files; the conversion has to
find it by itself, and commit nothing. The numbers are those of the projects' issues.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import check_cover
from checkpoint.errors import Incomplete, Mismatch
from checkpoint.format.box import Box
from checkpoint.interop import joining, naming
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion import emigrating, sighting
from checkpoint.interop.conversion.assembling import as_they_are
from checkpoint.interop.conversion.emigrating import Emigration, plan_emigration
from checkpoint.interop.conversion.exporting import export_checkpoint
from checkpoint.interop.conversion.importing import Adoption, import_checkpoint
from checkpoint.interop.conversion.names import from_rules
from checkpoint.interop.conversion.origins import Origin, foreign_origin, stored_origin
from checkpoint.interop.conversion.ruled import RuleChoice
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.expression import evaluate
from checkpoint.interop.moves import Foreign, How, Move, Plan
from checkpoint.interop.rules import plan_import
from checkpoint.interop.writing import plan_export
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import save_state
from tests.interop_samples import (
    LLAMA,
    Arrays,
    Files,
    assemble,
    check_equal,
    disperse,
    fingerprints,
    llama,
    megatron_llama,
    proved,
    specs_for,
    weights_for,
)

AXES = {"tensor": 3, "pipeline": 2}
SPREAD = "tensor=3,pipeline=2"
Change = Callable[[Move], Move]


def megatron(weights: Arrays) -> tuple[Plan, list[np.ndarray]]:
    shards = megatron_llama(weights, (1, 1, 1), (2, 2))
    plan = plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, [tensor for tensor, _ in shards])
    return plan, [bits for _, bits in shards]


def with_moves(plan: Plan, change: Change) -> Plan:
    """Return a plan that is wrong; it still fills every tensor exactly once."""
    wrong = replace(plan, moves=tuple(change(move) for move in plan.moves))
    for number, spec in enumerate(wrong.tensors):
        filled = [move.target_box for move in wrong.moves if move.target == number and move.how is How.FILL]
        check_cover(spec.name, spec.shape, filled)
    return wrong


def import_by(choice: RuleChoice | None, files: Files, store: MemoryStore) -> dict[str, int]:
    """Import files; return the fingerprints of what is then in the store."""
    import_checkpoint(files, "files:", store, Adoption(rules=choice))
    return {one.name: one.fingerprint for one in Stored(store).manifest.tensors}


def check_refused(monkeypatch, choice: RuleChoice | None, files: Files, wrong: Plan, message: str) -> None:
    """Let an import follow a plan that is wrong, and see that it does not believe itself."""
    monkeypatch.setattr(sighting, "plan_import" if choice else "as_they_are", lambda *_: wrong)
    store = MemoryStore("target")
    with pytest.raises(Mismatch, match=message):
        import_by(choice, files, store)
    assert not Catalog(store).steps()


def choice_of(name: str, sizes=LLAMA) -> RuleChoice:
    return RuleChoice(builtin_rules(name), sizes)


def stored(weights: Arrays) -> Origin:
    """Return a stored checkpoint of weights under their universal names."""
    plain = {name: torch.from_numpy(bits.view(np.float32)) for name, bits in weights.items()}
    save_state(store := MemoryStore("source"), {"model": plain})
    return stored_origin(Stored(store))


def export_by(emigration: Emigration, origin: Origin, spoil=lambda name, bits: bits) -> Files:
    """Export to memory; `spoil` changes what is written."""
    outward = plan_emigration(origin, emigration, lambda _: True)
    kept: list[Files] = []

    def write(contents) -> None:
        arrays = [
            spoil(one.name, contents.read(number, Box.whole(one.shape)))
            for number, one in enumerate(contents.tensors)
        ]
        kept.append(Files(contents.tensors, arrays.__getitem__, contents.about.axes))

    export_checkpoint(outward, "files:", write, lambda: kept[0])
    return kept[0]


def test_what_a_sound_plan_makes_is_believed():
    weights = llama()
    plan, arrays = megatron(weights)
    files = Files(plan.foreign, arrays.__getitem__, AXES)
    found = import_by(choice_of("llama-megatron"), files, MemoryStore("target"))
    check_equal({from_rules(name): mark for name, mark in fingerprints(weights).items()}, found)
    export_by(Emigration("files", SPREAD, choice_of("llama-megatron")), stored(weights))


def cut_in_halves(plan: Plan) -> Plan:
    """Return a plan that puts the ranks' parts of gate and up end to end, and then halves them."""
    numbers = {spec.name: number for number, spec in enumerate(plan.tensors)}

    def halve(move: Move) -> Move:
        name = plan.tensors[move.target].name
        if ".mlp.gate." not in name and ".mlp.up." not in name:
            return move
        row = 8 * plan.foreign[move.source].at["tensor"] + move.source_box.start[0]  # in [g0 u0 g1 u1 g2 u2]
        half = name.rsplit(".", 2)[0] + (".gate.weight" if row < 12 else ".up.weight")
        return replace(move, target=numbers[half], target_box=Box((row % 12, 0), move.target_box.size))

    return with_moves(plan, halve)


def test_a_gate_and_up_weight_split_at_the_wrong_boundary_is_caught(monkeypatch):
    """Megatron-LM pull request 520: ranks put end to end, then halved. Shapes, counts and norms agree."""
    weights = llama()
    plan, arrays = megatron(weights)
    wrong = assemble(cut_in_halves(plan), arrays)
    assert {name: bits.shape for name, bits in wrong.items()} == {
        n: bits.shape for n, bits in weights.items()
    }
    for layer in range(4):
        names = [f"layers.{layer}.mlp.{half}.weight" for half in ("gate", "up")]
        both = [
            np.sort(np.concatenate([state[name] for name in names]).reshape(-1)) for state in (wrong, weights)
        ]
        assert (both[0] == both[1]).all()  # the same elements: the same norm, mean, histogram
    message = r"the content of 8 of 38 tensors differs.*mlp.gate"
    choice, files = choice_of("llama-megatron"), Files(plan.foreign, arrays.__getitem__, AXES)
    check_refused(monkeypatch, choice, files, cut_in_halves(plan), message)

    monkeypatch.setattr(emigrating, "plan_export", lambda *told: cut_in_halves(plan_export(*told)))
    with pytest.raises(Mismatch, match=r"8 of its 38 tensors differ from the source's: .*mlp.gate"):
        export_by(Emigration("files", SPREAD, choice), stored(weights))


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_source_that_is_read_by_a_wrong_plan_is_caught_on_its_way_into_another_format(dtype, monkeypatch):
    plan, arrays = megatron(llama())
    choice, files = choice_of("llama-megatron"), Files(plan.foreign, arrays.__getitem__, AXES)
    emigration = Emigration("files", "replica=1", choice_of("llama-hf"), dtype)
    if dtype is None:
        export_by(emigration, foreign_origin(files, "memory://files", choice))
    monkeypatch.setattr(sighting, "plan_import", lambda *told: cut_in_halves(plan_import(*told)))
    with pytest.raises(Mismatch, match=r"mlp\.(gate|up)"):
        export_by(emigration, foreign_origin(files, "memory://files", choice))


def test_experts_that_change_places_are_caught(monkeypatch):
    """Megatron-LM issue 761: states of experts loaded into others."""
    sizes = {**LLAMA, "experts": 4}
    axes = {"tensor": 1, "pipeline": 1, "expert": 2}
    shapes = {name: bits.shape for name, bits in llama().items() if ".mlp." not in name}
    shapes |= {f"layers.{n}.mlp_norm.weight": (10,) for n in range(4)}
    shapes |= {f"layers.{n}.router.weight": (4, 10) for n in range(4)}
    for n, e in np.ndindex(4, 4):
        shapes |= {f"layers.{n}.experts.{e}.{part}.weight": (12, 10) for part in ("gate", "up")}
        shapes[f"layers.{n}.experts.{e}.down.weight"] = (10, 12)
    moments = {f"optimizer/exp_avg/{name}": shape for name, shape in shapes.items()}
    tensors = weights_for({**shapes, **moments})
    plan = plan_export(builtin_rules("mixtral-megatron"), sizes, axes, specs_for(tensors))
    files = disperse(plan, tensors)
    numbers = {spec.name: number for number, spec in enumerate(plan.tensors)}

    def swap_ranks(move: Move) -> Move:
        name = plan.tensors[move.target].name
        if not name.startswith("optimizer/") or ".experts." not in name:
            return move
        head, _, tail = name.partition(".experts.")
        expert, _, rest = tail.partition(".")
        return replace(move, target=numbers[f"{head}.experts.{(int(expert) + 2) % 4}.{rest}"])

    choice = choice_of("mixtral-megatron", sizes)
    found = Files(plan.foreign, files.__getitem__, axes)
    check_refused(monkeypatch, choice, found, with_moves(plan, swap_ranks), "the content of 48 of")


def turns_reversed(join, leaf, dim):
    ranks, turn, piece = KEY(join, leaf, dim)
    return ranks, -turn, piece


def layers_reversed(model, numbering, name, text, at):
    count = evaluate(numbering.count, model.scope(at))
    return NUMBER(model, numbering, name, str(count - 1 - int(text)), at)


KEY, NUMBER = joining._Join._key, naming._global_number


@pytest.mark.parametrize(
    ("room", "step", "wrong", "names"),
    [
        (joining._Join, "_key", turns_reversed, "attention"),
        (naming, "_global_number", layers_reversed, "layers"),
    ],
)
def test_a_planner_that_takes_a_wrong_step_is_not_asked_whether_it_was_right(
    room, step, wrong, names, monkeypatch
):
    shards = megatron_llama(llama(), (3,), (2, 2))
    files = Files(
        [one for one, _ in shards], [bits for _, bits in shards].__getitem__, {"tensor": 1, "pipeline": 2}
    )
    choice = choice_of("llama-megatron")
    import_by(choice, files, MemoryStore("sound"))
    monkeypatch.setattr(room, step, wrong)
    with pytest.raises(Mismatch, match=f"the content of .* tensors differs.*{names}"):
        import_by(choice, files, store := MemoryStore("target"))
    assert not Catalog(store).steps()


def test_random_streams_that_are_given_to_other_ranks_are_caught(monkeypatch):
    """Megatron-LM pull request 2658: keyed by a rank's number, which another layout counts otherwise."""
    streams = {f"other.rng.expert_{rank}": np.arange(16, dtype=np.uint32) + 99 * rank for rank in range(4)}
    plan = as_they_are([Foreign(name, "float32", bits.shape) for name, bits in streams.items()])
    files = Files(plan.foreign, list(streams.values()).__getitem__)
    assert len(import_by(None, files, MemoryStore("target"))) == 4
    turned = with_moves(plan, lambda move: replace(move, target=2 * move.target % 4 + move.target // 2))
    check_refused(monkeypatch, None, files, turned, "the content of 2 of 4 tensors differs")


def test_weights_that_a_writer_left_zero_are_caught():
    """DeepSpeed issue 6791: the writer of shards changed the dict that it read from; exit code 0."""
    spoiled = itertools.count()

    def spoil(name: str, bits: np.ndarray) -> np.ndarray:
        return np.zeros_like(bits) if next(spoiled) else bits

    with pytest.raises(Mismatch, match="37 of its 38 tensors differ from the source's"):
        export_by(Emigration("files", "replica=1", choice_of("llama-hf")), stored(llama()), spoil)


def test_only_the_first_rank_s_shards_are_not_enough():
    """DeepSpeed issue 7546: ranks other than the first wrote nothing."""
    shards = megatron_llama(llama(), (1, 1, 1), (2, 2))
    only = [tensor for tensor, _ in shards if tensor.at["tensor"] == 0]
    with pytest.raises(
        Incomplete, match=r"embedding.weight: nothing of it is there from tensor ranks \[1, 2\]"
    ):
        plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, only)
    stage = [tensor for tensor, _ in shards if tensor.at["pipeline"] == 0]
    with pytest.raises(Incomplete, match=r"'embedding.weight' should be there a second time"):
        plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, stage)
    with pytest.raises(Incomplete, match="20 of the 39 tensors of llama-megatron are not in the checkpoint"):
        plan_import(builtin_rules("llama-megatron"), {**LLAMA, "tied": 0}, AXES, stage)


def test_files_of_another_world_are_not_taken_for_this_one_s():
    """DeepSpeed issue 7599: stale files of the same names."""
    shards = [tensor for tensor, _ in megatron_llama(llama(), (1, 1, 1), (2, 2))]
    with pytest.raises(Mismatch, match="does not say where on the axes"):
        plan_import(builtin_rules("llama-megatron"), LLAMA, {"tensor": 2, "pipeline": 2}, shards)
    with pytest.raises(Mismatch, match="is there twice"):
        plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, [*shards, shards[3]])
    stale = [replace(tensor, shape=(5, 10)) if "word_emb" in tensor.name else tensor for tensor in shards]
    with pytest.raises(
        Mismatch, match=r"dim 0 of \(15, 10\) should have .* padded_vocab = 12 with the padding"
    ):
        plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, stale)


def test_tied_weights_that_were_dropped_or_have_come_apart_are_caught():
    """DeepSpeed issues 1896 and 3824, Megatron-LM issue 656."""
    weights = llama()
    shards = megatron_llama(weights, (1, 1, 1), (2, 2))
    rest = [tensor for tensor, _ in shards if tensor.name != "output_layer.weight"]
    with pytest.raises(Incomplete, match=r"'embedding.weight' should be there a second time"):
        plan_import(builtin_rules("llama-megatron"), LLAMA, AXES, rest)
    plan, arrays = megatron(weights)
    (number, *_) = [n for n, tensor in enumerate(plan.foreign) if tensor.name == "output_layer.weight"]
    arrays[number] = arrays[number] + np.uint32(1)
    with pytest.raises(Mismatch, match=r"'embedding.weight': the copies in embedding.word_embeddings"):
        proved(builtin_rules("llama-megatron"), LLAMA, AXES, plan.foreign, arrays.__getitem__)


def test_replicated_weights_that_differ_between_ranks_are_caught():
    plan, arrays = megatron(llama())
    (number, *_) = [
        n for n, tensor in enumerate(plan.foreign) if "layer_norm" in tensor.name and tensor.at["tensor"] == 2
    ]
    arrays[number] = arrays[number][::-1]  # as many elements, the same norm
    with pytest.raises(Mismatch, match=r"attention_norm.weight': the copies"):
        proved(builtin_rules("llama-megatron"), LLAMA, AXES, plan.foreign, arrays.__getitem__)


def test_an_optimizer_state_that_is_there_for_some_parameters_only_is_caught():
    """PyTorch issue 140898: state silently empty."""
    weights = llama()
    tensors = {**weights, **{f"optimizer/exp_avg/{name}": bits for name, bits in weights.items()}}
    plan = plan_export(builtin_rules("llama-hf"), LLAMA, {}, specs_for(tensors))
    some = [tensor for tensor in plan.foreign if tensor.name != "optimizer.exp_avg.model.norm.weight"]
    with pytest.raises(
        Incomplete, match=r"'optimizer/exp_avg/\*' is there for 37 .* 1: \['final_norm.weight'\]"
    ):
        plan_import(builtin_rules("llama-hf"), LLAMA, {}, some)
