"""Tied weights: one tensor by several names. Frameworks keep it once or several times; here it is one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import FormatError, Mismatch, Misuse
from checkpoint.format.box import Box
from checkpoint.format.tree import Json
from checkpoint.interop.formats.contract import is_weight
from checkpoint.interop.moves import Foreign, How, Move, Plan

TIED = "tied"  # what an export calls the ties in its plain data
_MODEL = "model"

Ties = Mapping[str, str]  # another name of a weight, and its name


def parse_ties(texts: Sequence[str]) -> dict[str, str]:
    """Return ties as people write them: OTHER=NAME. Raises FormatError."""
    ties: dict[str, str] = {}
    for text in texts:
        other, equals, name = text.partition("=")
        if not (equals and other and name) or other in ties or other == name:
            raise FormatError(f"{text!r} ties nothing: write each once, like lm_head.weight=wte.weight")
        if not (is_weight(other) and is_weight(name)):
            raise FormatError(f"{text!r} ties what is no weight: optimizer.* and other.* are none")
        ties[other] = name
    return ties


def merged(known: Ties, told: Ties) -> dict[str, str]:
    """Return ties that a checkpoint knows of together with what people tell, who are right if they differ.

    Where a name is tied to one that is tied itself, both are the last one's. Raises Misuse for a circle.
    """
    kept = {other: name for other, name in known.items() if other not in told and name not in told}
    ties = {**kept, **told}
    return {other: _last(ties, name) for other, name in ties.items()}


def ties_of_weights(told: Mapping[Any, Any], there: Collection[str]) -> dict[str, str]:
    """Return those ties whose weights are there, by their universal names, in the end."""
    ties = {other: name for other, name in told.items() if isinstance(other, str) and isinstance(name, str)}
    return {other: name for other, name in ties.items() if f"{_MODEL}/{_end(ties, name)}" in there}


def _end(ties: Ties, name: str) -> str | None:
    """Return the name that is tied to none itself; a circle has none."""
    seen = set()
    while name in ties:
        if name in seen:
            return None
        seen.add(name)
        name = ties[name]
    return name


def _last(ties: Ties, name: str) -> str:
    seen = [name]
    while (name := ties.get(name, name)) != seen[-1]:
        if name in seen:
            raise Misuse(f"{' = '.join([*seen, name])}: one of these has to be the weight's own name")
        seen.append(name)
    return name


def ties_of(skeleton: Json) -> dict[str, str]:
    """Return the ties of a stored model: names that stand for a tensor of another name."""
    model = skeleton.get(_MODEL) if isinstance(skeleton, dict) else None
    found: dict[str, str] = {}
    for other, node in model.items() if isinstance(model, dict) else ():
        match node:
            case {"$": "tensor", "name": str(name)} if name != f"{_MODEL}/{other}":
                found[other] = name.removeprefix(f"{_MODEL}/")
    return found


def universal(ties: Ties) -> dict[str, str]:
    """Return ties with the names that weights have in a universal checkpoint."""
    return {f"{_MODEL}/{other}": f"{_MODEL}/{name}" for other, name in ties.items()}


def tie(plan: Plan, ties: Ties) -> Plan:
    """Make one tensor of those that are tied: what else is there of it has to be an equal copy.

    Raises Misuse if there is no such weight, Mismatch if the two cannot be one.
    """
    numbers = {spec.name: number for number, spec in enumerate(plan.tensors)}
    gone: dict[int, int] = {}
    for other, name in ties.items():
        number = numbers.get(f"{_MODEL}/{name}")
        if number is None:
            raise Misuse(
                f"{other!r} cannot be tied to {name!r}: there is no weight {name!r} (`holdfast inspect` "
                "lists them; --tie OTHER=NAME tells of ties)"
            )
        copy = numbers.get(f"{_MODEL}/{other}")
        if copy is not None:
            one, two = plan.tensors[number], plan.tensors[copy]
            if (one.dtype, one.shape) != (two.dtype, two.shape):
                raise Mismatch(f"{other!r} cannot be {name!r}: they differ in type or shape")
            gone[copy] = number
    kept = [number for number in range(len(plan.tensors)) if number not in gone]
    renumbered = {number: place for place, number in enumerate(kept)}
    moves = [
        replace(
            move,
            target=renumbered[gone.get(move.target, move.target)],
            how=How.SAME if move.target in gone else move.how,
        )
        for move in plan.moves
    ]
    return replace(plan, tensors=tuple(plan.tensors[number] for number in kept), moves=tuple(moves))


def with_copies(plan: Plan, specs: Sequence[TensorSpec], ties: Ties) -> Plan:
    """Add the tensors that a format keeps once more, by their other names."""
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    foreign, moves = list(plan.foreign), list(plan.moves)
    for other, name in ties.items():
        number = numbers.get(f"{_MODEL}/{name}")
        if number is not None:
            spec, whole = specs[number], Box.whole(specs[number].shape)
            order = tuple(range(len(spec.shape)))
            moves.append(Move(len(foreign), whole, order, number, whole, How.SAME))
            foreign.append(Foreign(other, spec.dtype, spec.shape))
    return replace(plan, foreign=tuple(foreign), moves=tuple(moves))
