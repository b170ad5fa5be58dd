"""Placements: how the ranks of one mesh axis divide a tensor among them. Pure arithmetic, one dim at a time.

What a rank holds of a dim is a list of spans, in the order in which its own tensor keeps them. Axes divide
what the axes before them left, so a placement cuts positions of the rank's own tensor, not of the whole one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.errors import FormatError


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same region."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds a summand of the same region."""


@dataclass(frozen=True, slots=True)
class Only:
    """The ranks at these coordinates hold the same region, the others nothing: pipeline stages, experts."""

    coordinates: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """The ranks of the axis divide one dim among them, in order, as `torch.chunk` does."""

    dim: int


@dataclass(frozen=True, slots=True)
class StridedShard:
    """The dim is chunked into `split` pieces, and the ranks divide each: torch's `_StridedShard`.

    FSDP2 over tensor parallelism makes it: the inner axis divided the dim first, although it comes later.
    """

    dim: int
    split: int


@dataclass(frozen=True, slots=True)
class SectionShard:
    """The dim consists of sections, and the ranks divide each into pieces of given sizes, in order.

    `sections[s][r]` is how much of section s rank r of the axis holds. One section: an uneven shard (heads
    per rank); several: the q, k and v, or the gate and up halves, of a fused weight.
    """

    dim: int
    sections: tuple[tuple[int, ...], ...]


Dividing = Shard | StridedShard | SectionShard
Placement = Replicate | Partial | Only | Dividing
Span = tuple[int, int]
Spans = tuple[Span, ...]


def chunk(size: int, ranks: int, coordinate: int) -> Span:
    """Return (start, size) of a rank's chunk of a dim: all of ceil(size / ranks) but the last ones."""
    step = -(-size // ranks)
    begin = min(step * coordinate, size)
    return begin, min(step, size - begin)


def length(spans: Sequence[Span]) -> int:
    """Return how many positions spans hold together."""
    return sum(size for _, size in spans)


def divide(spans: Spans, placement: Dividing, ranks: int, coordinate: int) -> Spans:
    """Return what the rank at a coordinate gets of the spans that the ranks of its axis hold together.

    Raises FormatError if the sections of a placement do not add up to the dim, or not to so many ranks.
    """
    return _take(spans, _ranges(length(spans), placement, ranks, coordinate))


def _ranges(total: int, placement: Dividing, ranks: int, coordinate: int) -> list[Span]:
    """Return which of `total` positions the rank at a coordinate gets."""
    match placement:
        case Shard():
            return [chunk(total, ranks, coordinate)]
        case StridedShard(split=split):
            return [_within(chunk(total, split, piece), ranks, coordinate) for piece in range(split)]
        case SectionShard(sections=sections):
            _check_sections(placement, ranks, total)
            return _of_sections(sections, coordinate)


def _within(piece: Span, ranks: int, rank: int) -> Span:
    start, size = chunk(piece[1], ranks, rank)
    return piece[0] + start, size


def _of_sections(sections: tuple[tuple[int, ...], ...], rank: int) -> list[Span]:
    ranges, origin = [], 0
    for sizes in sections:
        ranges.append((origin + sum(sizes[:rank]), sizes[rank]))
        origin += sum(sizes)
    return ranges


def _check_sections(placement: SectionShard, ranks: int, total: int) -> None:
    sections = placement.sections
    if any(len(sizes) != ranks for sizes in sections):
        raise FormatError(f"{placement} has to name one size for each of the {ranks} ranks of its axis")
    if sum(map(sum, sections)) != total:
        raise FormatError(f"the sections of {placement} add up to {sum(map(sum, sections))}, not to {total}")


def _take(spans: Spans, ranges: Sequence[Span]) -> Spans:
    """Return the spans at some ranges of positions; neighbours become one."""
    taken: list[Span] = []
    for first, count in ranges:
        origin = 0
        for start, size in spans:
            low, high = max(first, origin), min(first + count, origin + size)
            if low < high:
                _append(taken, (start + low - origin, high - low))
            origin += size
    return tuple(taken)


def _append(spans: list[Span], span: Span) -> None:
    if spans and sum(spans[-1]) == span[0]:
        spans[-1] = (spans[-1][0], spans[-1][1] + span[1])
    else:
        spans.append(span)
