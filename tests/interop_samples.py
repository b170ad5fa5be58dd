"""Small models, their foreign shards cut by plain numpy, and a plan carried out without cleverness."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.layout import Box
from checkpoint.interop.conversion.contract import ConversionSettings
from checkpoint.interop.conversion.proving import prove
from checkpoint.interop.document import RuleSet
from checkpoint.interop.expression import Size
from checkpoint.interop.formats.contract import About
from checkpoint.interop.moves import Foreign, How, Plan
from checkpoint.interop.reference import account_by_rules

Arrays = dict[str, np.ndarray]
Shards = list[tuple[Foreign, np.ndarray]]


def random_bits(shape: Sequence[int], seed: int) -> np.ndarray:
    """Return bits of a float32 tensor, as they are stored."""
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def weights_for(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> Arrays:
    """Return random content for every tensor."""
    return {name: random_bits(shape, seed + number) for number, (name, shape) in enumerate(shapes.items())}


def specs_for(tensors: Arrays) -> list[TensorSpec]:
    """Describe global tensors."""
    return [TensorSpec(name, "float32", array.shape) for name, array in tensors.items()]


def fingerprints(tensors: Arrays) -> dict[str, int]:
    """Return the fingerprint of each whole tensor."""
    return {
        name: fingerprint(array, "float32", array.shape, Box.whole(array.shape))
        for name, array in tensors.items()
    }


def foreign(name: str, array: np.ndarray, **at: int) -> tuple[Foreign, np.ndarray]:
    """Return a foreign tensor and its bits."""
    return Foreign(name, "float32", array.shape, at), array


class Files:
    """A foreign checkpoint of which `read` returns the bits of a whole tensor, by its number."""

    def __init__(
        self,
        tensors: Sequence[Foreign],
        read: Callable[[int], np.ndarray],
        axes: Mapping[str, int] | None = None,
    ) -> None:
        self.about, self.tensors, self._whole = About("files", axes or {}), tensors, read

    def read(self, number: int, box: Box) -> np.ndarray:
        """Return the bits of a box."""
        return np.array(self._whole(number)[slices(box)])

    def settle(self) -> None:
        """Do nothing."""


def proved(
    rules: RuleSet,
    sizes: Mapping[str, Size],
    axes: Mapping[str, int],
    tensors: Sequence[Foreign],
    read: Callable[[int], np.ndarray],
) -> dict[str, int]:
    """Return the fingerprints that conversions are held against, of foreign tensors by the words of rules."""
    account = account_by_rules(rules, sizes, axes, dict(enumerate(tensors)))
    return prove(account, Files(tensors, read), ConversionSettings())


def check_agreed(rules: RuleSet, sizes: Mapping[str, Size], axes: Mapping[str, int], plan: Plan) -> None:
    """See that a plan and the account of the same foreign tensors tell the same, each in its own way."""
    account = account_by_rules(rules, sizes, axes, dict(enumerate(plan.foreign)))
    assert account.tensors == {spec.name: spec for spec in plan.tensors}
    moves = {
        (one.source, one.source_box, plan.tensors[one.target].name, one.target_box, one.how is How.MEAN)
        for one in plan.moves
    }
    assert moves == {
        (one.source, one.box, one.name, one.place(one.box), one.is_mean) for one in account.shares
    }
    assert set(plan.padding) == {(one.source, one.box) for one in account.padding}


def check_equal(sources: Mapping[str, int], targets: Mapping[str, int]) -> None:
    """See that the same tensors have the same fingerprints. Raises Mismatch naming those that do not."""
    missing, extra = sorted(sources.keys() - targets.keys()), sorted(targets.keys() - sources.keys())
    if missing or extra:
        raise Mismatch(f"tensors are missing in the target: {missing[:5]}, or new in it: {extra[:5]}")
    changed = [name for name, value in sources.items() if targets[name] != value]
    if changed:
        raise Mismatch(f"the content of {len(changed)} of {len(sources)} tensors differs: {changed[:5]}")


def assemble(plan: Plan, arrays: Sequence[np.ndarray]) -> Arrays:
    """Carry out an import: fill the global tensors, then see that copies are equal."""
    tensors = [np.zeros(spec.shape, np.uint32) for spec in plan.tensors]
    means: dict[tuple[int, Box], list[np.ndarray]] = {}
    for move in sorted(plan.moves, key=lambda move: move.how is How.SAME):
        part = (
            arrays[move.source][slices(move.source_box)].transpose(move.order).reshape(move.target_box.size)
        )
        place = slices(move.target_box)
        if move.how is How.FILL:
            tensors[move.target][place] = part
        elif move.how is How.SAME:
            assert (tensors[move.target][place] == part).all()
        else:
            means.setdefault((move.target, move.target_box), []).append(part.view(np.float32))
    for (target, box), parts in means.items():
        tensors[target][slices(box)] = np.mean(parts, axis=0, dtype=np.float32).view(np.uint32)
    return {spec.name: tensor for spec, tensor in zip(plan.tensors, tensors, strict=True)}


def disperse(plan: Plan, tensors: Arrays) -> list[np.ndarray]:
    """Carry out an export: fill the foreign tensors; what nothing fills stays zero."""
    arrays = [np.zeros(tensor.shape, np.uint32) for tensor in plan.foreign]
    for move in plan.moves:
        part = tensors[plan.tensors[move.target].name][slices(move.target_box)]
        turned = tuple(move.source_box.size[dim] for dim in move.order)
        back = np.argsort(move.order) if move.order else ()
        arrays[move.source][slices(move.source_box)] = part.reshape(turned).transpose(back)
    return arrays


def slices(box: Box) -> tuple[slice, ...]:
    """Return what a box selects."""
    return tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))


# ------------------------------------------------------------------ a Llama, and how Megatron cuts it

LLAMA: dict[str, Size] = {
    "layers": 4,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 2,
    "hidden": 10,
    "inner": 12,
    "vocab": 11,
    "padded_vocab": 12,
    "tied": 1,
}


def llama(seed: int = 0, layers: int = 4, tied: int = 1) -> Arrays:
    """Return the global tensors of a small Llama: 6 heads of 2 in 3 groups, hidden 10, inner 12, 11 words."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (11, 10)}
    for n in range(layers):
        shapes |= {
            f"layers.{n}.attention_norm.weight": (10,),
            f"layers.{n}.attention.q.weight": (12, 10),
            f"layers.{n}.attention.k.weight": (6, 10),
            f"layers.{n}.attention.v.weight": (6, 10),
            f"layers.{n}.attention.out.weight": (10, 12),
            f"layers.{n}.mlp_norm.weight": (10,),
            f"layers.{n}.mlp.gate.weight": (12, 10),
            f"layers.{n}.mlp.up.weight": (12, 10),
            f"layers.{n}.mlp.down.weight": (10, 12),
        }
    shapes["final_norm.weight"] = (10,)
    if not tied:
        shapes["head.weight"] = (11, 10)
    return weights_for(shapes, seed)


def megatron_llama(weights: Arrays, groups: Sequence[int], stages: Sequence[int], tied: int = 1) -> Shards:
    """Cut a Llama as Megatron does: `groups[t]` query groups on tensor rank t, `stages[p]` layers on p."""
    tp, pp = len(groups), len(stages)
    shards: Shards = []
    for p, t in np.ndindex(pp, tp):
        at = {"tensor": t, "pipeline": p}

        def put(name: str, array: np.ndarray, at: dict[str, int] = at) -> None:
            shards.append(foreign(name, array, **at))

        if p == 0:
            put("embedding.word_embeddings.weight", vocabulary(weights["embedding.weight"], tp)[t])
        for local in range(stages[p]):
            put_layer(put, weights, sum(stages[:p]) + local, f"decoder.layers.{local}", (groups, t))
        if p == pp - 1:
            put("decoder.final_layernorm.weight", weights["final_norm.weight"])
            if not tied:
                put("output_layer.weight", vocabulary(weights["head.weight"], tp)[t])
            elif pp > 1:
                put("output_layer.weight", vocabulary(weights["embedding.weight"], tp)[t])
    return shards


def put_layer(put, weights: Arrays, layer: int, name: str, share: tuple[Sequence[int], int]) -> None:
    """Cut one layer: the groups' queries, key and value in turn; gate above up; columns of what comes out."""
    groups, t = share
    w = {
        key.removeprefix(f"layers.{layer}."): array
        for key, array in weights.items()
        if f"layers.{layer}." in key
    }
    tp, first, last = len(groups), sum(groups[:t]), sum(groups[: t + 1])
    fused = []
    for g in range(first, last):
        fused += [w["attention.q.weight"][4 * g : 4 * g + 4], w["attention.k.weight"][2 * g : 2 * g + 2]]
        fused += [w["attention.v.weight"][2 * g : 2 * g + 2]]
    put(f"{name}.self_attention.linear_qkv.layer_norm_weight", w["attention_norm.weight"])
    put(f"{name}.self_attention.linear_qkv.weight", np.concatenate(fused))
    put(f"{name}.self_attention.linear_proj.weight", w["attention.out.weight"][:, 4 * first : 4 * last])
    put(f"{name}.mlp.linear_fc1.layer_norm_weight", w["mlp_norm.weight"])
    gate, up = np.split(w["mlp.gate.weight"], tp)[t], np.split(w["mlp.up.weight"], tp)[t]
    put(f"{name}.mlp.linear_fc1.weight", np.concatenate([gate, up]))
    put(f"{name}.mlp.linear_fc2.weight", np.split(w["mlp.down.weight"], tp, 1)[t])


def vocabulary(weight: np.ndarray, tp: int) -> list[np.ndarray]:
    """Pad 11 words to 12 with rubbish, and divide them."""
    return np.split(np.concatenate([weight, random_bits((1, weight.shape[1]), 99)]), tp)
