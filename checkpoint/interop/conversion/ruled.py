"""Placements from rules: what a framework's own ranks would hold, read off the plan of an export. Pure."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, Incomplete, Mismatch, Misuse
from checkpoint.format.box import Box
from checkpoint.format.layout import Only, Placement, Replicate, SectionShard, Shard
from checkpoint.format.manifest import Manifest
from checkpoint.format.placement import chunk
from checkpoint.format.scheme import Scheme
from checkpoint.interop.builtin import builtin_names, builtin_rules, find_document
from checkpoint.interop.conversion.names import rule_name
from checkpoint.interop.document import Held, RuleSet, Use
from checkpoint.interop.expression import Size
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.writing import plan_export

SIZES = "sizes"  # what a manifest's meta calls them
# Whatever files say of it; others, such as the padding of a vocabulary, are how files are written.
_OF_THE_MODEL = {
    *("layers", "heads", "kv_heads", "head_dim", "hidden", "inner"),
    *("vocab", "positions", "experts", "tied", "qkv_bias"),
}
_SPREADING = ("tensor", "pipeline", "expert")  # the others hold copies, or divide whatever is left
Boxes = dict[int, list[Box]]  # by coordinate


@dataclass(frozen=True, slots=True)
class RuleChoice:
    """A rule set, and the sizes of the model that it is to be told."""

    rules: RuleSet
    sizes: Mapping[str, Size] = field(default_factory=dict)


def choose_rules(text: str, settings: Sequence[str] = ()) -> RuleChoice:
    """Return the rules of a built-in name or a file (`~` is the home directory), with sizes like "layers=12".

    A size that differs from layer to layer is a list: "kv_heads=3,2,2".

    Raises FormatError.
    """
    if text in builtin_names():
        rules = builtin_rules(text)
    elif (path := Path(os.path.expanduser(text))).is_file():
        rules = read_rules(_document(path), text, find_document)
    else:
        raise FormatError(
            f"{text!r} is neither a file nor a built-in rule set; there are {', '.join(builtin_names())}"
        )
    return RuleChoice(rules, parse_sizes(settings))


def _document(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no text in UTF-8 ({error}), so no rules: give a YAML file") from error


def model_sizes(*told: Mapping[str, Any]) -> dict[str, int]:
    """Return what is told of the model, and not of its files or ranks; what is told later is right."""
    known = {name: size for sizes in told for name, size in sizes.items() if name in _OF_THE_MODEL}
    return {name: size for name, size in known.items() if type(size) is int and size >= 0}


def sizes_in(manifest: Manifest) -> dict[str, int]:
    """Return what a stored checkpoint knows of its model's sizes, from the files that it came from."""
    sizes = manifest.meta.get(SIZES)
    return model_sizes(sizes) if isinstance(sizes, dict) else {}


def knowing(choice: RuleChoice, known: Mapping[str, int]) -> RuleChoice:
    """Return rules that are told what a checkpoint knows of its model, where people did not tell them."""
    own = choice.rules.sizes  # a list there says how ranks share: no default, and no model knows it
    asked = {name: size for name, size in known.items() if name in own and not isinstance(own[name], tuple)}
    return RuleChoice(choice.rules, {**asked, **choice.sizes})


def uncast(choice: RuleChoice) -> RuleChoice:
    """Return rules that change no value: what is written out keeps its type, and is no average but a copy."""
    rules = tuple(
        replace(
            one,
            dtype=None,
            axes=_copied(one.axes),
            pieces=tuple(replace(piece, axes=_copied(piece.axes)) for piece in one.pieces),
        )
        for one in choice.rules.rules
    )
    states = tuple(replace(one, dtype=None) for one in choice.rules.states)
    return RuleChoice(replace(choice.rules, rules=rules, states=states), choice.sizes)


def _copied(axes: Mapping[str, Use]) -> dict[str, Use]:
    return {axis: Held.SAME if use is Held.MEAN else use for axis, use in axes.items()}


def misfit(error: Exception) -> Misuse:
    """Return what says of a checkpoint that the rules, sizes or ranks given are not for it."""
    return (
        error
        if isinstance(error, Misuse)
        else Misuse(f"{error}: other rules, sizes (--set) or numbers of ranks (--to) may fit this model")
    )


def rule_names() -> list[str]:
    """List the built-in rule sets."""
    return builtin_names()


def parse_sizes(settings: Sequence[str]) -> dict[str, Size]:
    """Return sizes as people write them: NAME=N, or NAME=N,N,... for one entry a rank. Raises FormatError."""
    sizes: dict[str, Size] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        parts = value.split(",")
        if not equals or name in sizes or not all(part.strip().isdecimal() for part in parts):
            raise FormatError(f"{setting!r} is no size: write each once, like layers=12 or kv_heads=3,2,2")
        numbers = tuple(int(part) for part in parts)
        sizes[name] = numbers[0] if len(numbers) == 1 else numbers
    return sizes


def placements_by(
    choice: RuleChoice, specs: Sequence[TensorSpec], scheme: Scheme
) -> dict[str, dict[str, Placement]]:
    """Return what each axis does with each parameter. Raises Misuse, FormatError."""
    known = set(_SPREADING) & _axes_of(choice.rules)  # a dense model's copies on expert ranks are replicas
    axes = {axis: ranks for axis, ranks in scheme.mesh.axes if axis in known and ranks > 1}
    weights = [spec for spec in specs if spec.name.startswith("model/")]
    renamed = [TensorSpec(rule_name(spec.name), spec.dtype, spec.shape) for spec in weights]
    try:
        plan = plan_export(choice.rules, choice.sizes, axes, renamed)
    except (Mismatch, Incomplete, FormatError) as error:
        raise misfit(error) from error
    held: dict[str, dict[str, Boxes]] = {
        spec.name: {axis: {at: [] for at in range(ranks)} for axis, ranks in axes.items()} for spec in renamed
    }
    for move in plan.moves:
        where, name = plan.foreign[move.source].at, plan.tensors[move.target].name
        for axis in axes:
            held[name][axis][where[axis]].append(move.target_box)
    return {
        spec.name: {axis: _placement(spec, found) for axis, found in held[spec.name].items()}
        for spec in renamed
    }


def _axes_of(rules: RuleSet) -> set[str]:
    """Return the axes that some rule speaks of."""
    found = {axis for rule in rules.rules for axis in rule.axes}
    found |= {axis for rule in rules.rules for piece in rule.pieces for axis in piece.axes}
    return found | {one.axis for rule in rules.rules for one in rule.numbers.values()}


def _placement(spec: TensorSpec, held: Boxes) -> Placement:
    """Return the placement that gives each coordinate what it holds; Replicate where there is none such."""
    there = [at for at, boxes in held.items() if boxes]
    if not there:
        raise FormatError(f"no rank of the layout holds {spec.name!r} by these rules")
    if all(set(held[at]) == set(held[there[0]]) for at in there):
        return Replicate() if len(there) == len(held) else Only(tuple(there))
    for dim, size in enumerate(spec.shape):
        spans = [_span(boxes, dim) for boxes in held.values()]
        ends = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] == ends[:-1] and ends[-1] == size:
            sizes = tuple(stop - start for start, stop in spans)
            if sizes == tuple(chunk(size, len(held), at)[1] for at in held):
                return Shard(dim)
            return SectionShard(dim, (sizes,))
    return Replicate()


def _span(boxes: Sequence[Box], dim: int) -> tuple[int, int]:
    return min((box.start[dim] for box in boxes), default=0), max((box.stop[dim] for box in boxes), default=0)
