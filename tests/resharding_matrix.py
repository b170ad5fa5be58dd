"""Three small models under the layouts of real trainings: what each rank holds, cut by plain numpy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

import checkpoint
from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.restore import restore_into
from checkpoint.engine.targets import Wanted, bits_of
from checkpoint.format.box import Box
from checkpoint.format.flat import flat_plan_of, part_number, share_of
from checkpoint.format.layout import Layout, Spread, local_shape
from checkpoint.format.manifest import Manifest
from checkpoint.format.scheme import parse_layout
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.contract import ConversionSettings
from checkpoint.interop.conversion.resharding import layout_meta
from checkpoint.interop.conversion.roles import lay_out, pieces_of
from checkpoint.interop.conversion.ruled import RuleChoice, placements_by
from checkpoint.interop.conversion.writing import Draft, write_checkpoint
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.placing import resolve_sizes
from checkpoint.store.contract import Store
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import save_state
from tests.layout_samples import numpy_local, slices

LAYOUTS = {
    "DP": "replica=2",
    "ZeRO-1": "replica=4,zero=1",
    "ZeRO-2": "replica=2,zero=2,align=8",
    "ZeRO-3": "replica=3,zero=3",
    "FSDP2": "shard=4",
    "HSDP": "replica=2,shard=2",
    "TP2": "tensor=2",
    "TP4": "tensor=4",
    "PP2": "pipeline=2",
    "TP2xPP2": "pipeline=2,tensor=2",
    "TP2xDP2": "replica=2,tensor=2",
    "EP2": "expert=2",
    "3 shards": "shard=3",
    "5 replicas": "replica=5,zero=1,align=4",
    "ZeRO-1 x TP2": "replica=3,zero=1,tensor=2",
    "ZeRO-2 x TP2 x PP2": "replica=5,zero=2,tensor=2,pipeline=2",
    "ZeRO-1 x PP2": "pipeline=2,replica=5,zero=1",
    "ZeRO-3 x TP2": "replica=3,zero=3,tensor=2",
}
_HEADS: dict[str, Size] = {
    "layers": 2,
    "heads": 4,
    "head_dim": 2,
    "hidden": 10,
    "vocab": 13,
    "padded_vocab": 16,
}
MODELS: dict[str, tuple[str, dict[str, Size]]] = {
    "GPT": ("gpt-megatron", {**_HEADS, "inner": 12, "positions": 5, "tied": 1}),
    "Llama": ("llama-megatron", {**_HEADS, "heads": 8, "kv_heads": 4, "inner": 8, "tied": 0}),
    "MoE": ("mixtral-megatron", {**_HEADS, "kv_heads": 4, "inner": 8, "experts": 4, "tied": 1}),
}
CURSOR = {"epoch": 1, "sample": 4321}


@dataclass(frozen=True)
class Truth:
    """A training state: its checkpoint as one rank saved it, and the bits of each of its tensors."""

    store: Store
    manifest: Manifest
    arrays: Mapping[str, np.ndarray]
    rules: RuleChoice

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(one.name, one.dtype, one.shape) for one in self.manifest.tensors]

    def layout(self, text: str) -> Layout:
        scheme = parse_layout(text)
        return lay_out(self.specs, scheme, placements_by(self.rules, self.specs, scheme))


def make_truth(model: str) -> Truth:
    """Save a model with both moments, its step and its cursor; a tied output layer is there by two names."""
    name, sizes = MODELS[model]
    rules = builtin_rules(name)
    scope = Scope(resolve_sizes(rules, sizes), {}, {})
    weights: dict[str, torch.Tensor] = {}
    torch.manual_seed(7)
    for declared in rules.tensors:
        if declared.when is None or evaluate(declared.when, scope):
            counts = [range(evaluate(count, scope)) for count in declared.each.values()]
            for numbers in np.ndindex(*map(len, counts)):
                filled = declared.names.fill(dict(zip(declared.each, map(int, numbers), strict=True)))
                weights[filled] = torch.randn([evaluate(dim, scope) for dim in declared.shape])
    states = {
        key: {"step": torch.tensor(9.0), "exp_avg": torch.randn_like(one), "exp_avg_sq": torch.rand_like(one)}
        for key, one in weights.items()
    }
    if sizes["tied"]:
        weights["head.weight"] = weights["embedding.weight"]
    groups = [{"params": list(states), "lr": 0.1}]
    store = MemoryStore(model)
    state = {"model": weights, "optimizer": {"state": states, "param_groups": groups}, "cursor": CURSOR}
    save_state(store, state, step=9, meta={"data_cursor": CURSOR})
    loaded = checkpoint.flatten_state(checkpoint.load(store).state).tensors
    arrays = {key: np.array(bits_of(one)) for key, one in loaded.items()}
    return Truth(store, checkpoint.Catalog(store).manifest(9), arrays, RuleChoice(rules, sizes))


@dataclass
class Memory:
    """What one rank holds: its own tensors, and its part of each flat buffer. What is padding stays -1."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    buffers: list[np.ndarray] = field(default_factory=list)


def empty_memory(truth: Truth, layout: Layout, rank: int) -> Memory:
    """Return the memory of a rank before anything is restored."""
    shapes = {spec.name: spec.shape for spec in truth.specs}
    flat = {name for group in layout.flats for name in group.names}
    memory = Memory()
    for name, placements in layout.placements.items():
        shape = local_shape(Spread(layout.mesh, placements), shapes[name], rank)
        if name not in flat and shape is not None:
            memory.tensors[name] = np.full(shape, -1, np.int32).view("<u4")
    for group in layout.flats:
        length = flat_plan_of(layout, group, shapes, rank).part_length
        memory.buffers.append(np.full(length, -1, np.int32).view("<u4"))
    return memory


def cut_memory(truth: Truth, layout: Layout, rank: int) -> Memory:
    """Return the same, filled by numpy from whole tensors: cut axis by axis, flattened, padded, divided."""
    local = {
        name: numpy_local(truth.arrays[name], layout.mesh, placements, rank)
        for name, placements in layout.placements.items()
    }
    flat = {name for group in layout.flats for name in group.names}
    memory = Memory({name: one for name, one in local.items() if name not in flat and one is not None})
    for group in layout.flats:
        rows = [one.reshape(-1) for name in group.names if (one := local[name]) is not None]
        whole = np.concatenate(rows) if rows else np.zeros(0, "<u4")
        parts = int(np.prod([dict(layout.mesh.axes)[axis] for axis in group.axes]))
        length = -(-len(whole) // parts)
        length = -(-length // group.part_multiple) * group.part_multiple
        padded = np.full(length * parts, -1, np.int32).view("<u4")
        padded[: len(whole)] = whole
        memory.buffers.append(np.split(padded, parts)[part_number(layout, group.axes, rank)])
    return memory


def places_of(truth: Truth, layout: Layout, rank: int, memory: Memory):
    """Yield (name, box, the view of the rank's memory that holds it)."""
    share = share_of(layout, {spec.name: spec.shape for spec in truth.specs}, rank)
    buffer_of = {name: number for number, group in enumerate(layout.flats) for name in group.names}
    for name, parts in share.items():
        for part in parts:
            if part.box.is_empty:
                continue
            if name in buffer_of:
                run = memory.buffers[buffer_of[name]][slices(part.local)]
                yield name, part.box, run.reshape(part.box.size)
            else:
                own = memory.tensors[name]
                yield name, part.box, own[slices(part.local)] if own.ndim else own


def restore(truth: Truth, store: Store, layout: Layout) -> list[Memory]:
    """Restore a checkpoint into the memories of a layout's ranks, each by itself."""
    specs = {spec.name: spec for spec in truth.specs}
    memories = []
    for rank in layout.mesh.members:
        memory = empty_memory(truth, layout, rank)
        wanted = [
            Wanted(name, specs[name].dtype, specs[name].shape, box, torch.from_numpy(view.view(np.float32)))
            for name, box, view in places_of(truth, layout, rank, memory)
        ]
        restore_into(store, wanted)
        memories.append(memory)
    return memories


class RankMemories:
    """The ranks' memories as global tensors: each box is read where one of its holders has it, in turns."""

    def __init__(self, truth: Truth, layout: Layout, memories: list[Memory]) -> None:
        self.tensors = truth.specs
        numbers = {spec.name: number for number, spec in enumerate(truth.specs)}
        self._held: dict[tuple[int, Box], list[np.ndarray]] = {}
        for rank, memory in zip(layout.mesh.members, memories, strict=True):
            for name, box, view in places_of(truth, layout, rank, memory):
                self._held.setdefault((numbers[name], box), []).append(view)

    def read(self, wishes):
        return [
            held[number % len(held)].copy() for number, box in wishes for held in [self._held[number, box]]
        ]


def save(truth: Truth, layout: Layout, text: str, memories: list[Memory]) -> Store:
    """Write a checkpoint from the ranks' memories, each box from a rank that holds it."""
    store = MemoryStore(text)
    manifest = truth.manifest
    known = {one.name: one.fingerprint for one in manifest.tensors}
    pieces = tuple(pieces_of(layout, truth.specs))
    meta = {**layout_meta(layout, text), "data_cursor": manifest.data_cursor}
    draft = Draft("made", manifest.step, tuple(truth.specs), manifest.skeleton, meta, pieces, text)

    def check(found: Mapping[str, int]) -> None:
        assert found == known

    contents = RankMemories(truth, layout, memories)
    write_checkpoint(store, draft, contents, settings=ConversionSettings(), check=check)
    return store


def assert_same_memory(found: Memory, expected: Memory) -> None:
    """See that a rank holds, element by element, what numpy says; padding included, which nobody fills."""
    assert found.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        assert np.array_equal(found.tensors[name], array), name
    assert len(found.buffers) == len(expected.buffers)
    for one, other in zip(found.buffers, expected.buffers, strict=True):
        assert np.array_equal(one, other)
