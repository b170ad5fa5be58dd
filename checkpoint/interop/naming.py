"""Names: which rule a foreign name falls under, and what its captures say; a state follows its parameter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.errors import Mismatch
from checkpoint.interop.document import Numbering, Rule, RuleSet, State
from checkpoint.interop.expression import Scope, Size, evaluate
from checkpoint.interop.grammar import PARAMETER


@dataclass(frozen=True, slots=True)
class Model:
    """A rule set made concrete: a model's sizes, and how many ranks of which axes hold the checkpoint."""

    rules: RuleSet
    sizes: Mapping[str, Size]
    axes: Mapping[str, int]

    def scope(self, at: Mapping[str, int]) -> Scope:
        """Return what expressions mean for a shard at a place."""
        return Scope(self.sizes, self.axes, at)

    def active_rules(self) -> list[Rule]:
        """Return the rules whose condition holds."""
        return [rule for rule in self.rules.rules if rule.when is None or evaluate(rule.when, self.scope({}))]


@dataclass(frozen=True, slots=True)
class Case:
    """A rule and what its captures are, numbers as in the global names; and which state of the parameter."""

    rule: Rule
    captures: tuple[tuple[str, str | int], ...]
    state: State | None = None
    state_captures: tuple[tuple[str, str], ...] = ()

    def target(self, piece: int, series: Mapping[str, int]) -> str:
        """Return the global name of a piece, where `series` numbers it."""
        name = self.rule.pieces[piece].to.fill({**dict(self.captures), **series})
        if self.state is None:
            return name
        return self.state.to.fill({**dict(self.state_captures), PARAMETER: name})

    @property
    def dtype(self) -> str | None:
        """The dtype that the rules want, if they want one."""
        return self.state.dtype if self.state else self.rule.dtype


def case_of(model: Model, rules: Sequence[Rule], name: str, at: Mapping[str, int]) -> Case:
    """Return the one case that a foreign name is of. Raises Mismatch if it fits nothing, or two things."""
    found = list(_cases(model, rules, name, at))
    if not found:
        raise Mismatch(f"no rule of {model.rules.name} matches {name!r}: add one, if only to drop it")
    if len(found) > 1:
        which = " and ".join(f"{case.rule}" for case in found[:3])
        raise Mismatch(f"{name!r} is matched by {which}: exactly one rule may")
    return found[0]


def local_number(model: Model, numbering: Numbering, number: int, at: Mapping[str, int]) -> int | None:
    """Return what a global number is called on a rank; None if the rank does not have it."""
    scope = model.scope(at)
    local = number - evaluate(numbering.first, scope)
    return local if 0 <= local < evaluate(numbering.count, scope) else None


def _cases(model: Model, rules: Sequence[Rule], name: str, at: Mapping[str, int]) -> Iterator[Case]:
    for state in model.rules.states:
        found = state.names.match(name)
        if found is not None:
            parameter = found.pop(PARAMETER)
            for rule, captures in _matches(model, rules, parameter, at):
                yield Case(rule, captures, state, tuple(sorted(found.items())))
    for rule, captures in _matches(model, rules, name, at):
        yield Case(rule, captures)


def _matches(
    model: Model, rules: Sequence[Rule], name: str, at: Mapping[str, int]
) -> Iterator[tuple[Rule, tuple[tuple[str, str | int], ...]]]:
    for rule in rules:
        found = rule.names.match(name)
        if found is not None:
            captures: dict[str, str | int] = dict(found)
            for capture, numbering in rule.numbers.items():
                if capture in found:
                    captures[capture] = _global_number(model, numbering, name, found[capture], at)
            yield rule, tuple(sorted(captures.items()))


def _global_number(model: Model, numbering: Numbering, name: str, text: str, at: Mapping[str, int]) -> int:
    scope = model.scope(at)
    count = evaluate(numbering.count, scope)
    if not text.isdecimal() or str(int(text)) != text or int(text) >= count:
        raise Mismatch(f"{name!r}: {text!r} is none of the {count} numbers of {numbering.axis}={at}")
    return evaluate(numbering.first, scope) + int(text)
