"""The structure of a rank's share: which chunks it writes, where they lie in its tensors and in its region.

It follows from names, dtypes, shapes, placements and devices alone, so it can be kept between saves: nothing
in it points at a tensor, and whatever tensors a save is given are the ones that are copied.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.engine.arena import aligned
from checkpoint.engine.contract import Slot
from checkpoint.engine.leaves import Leaf, Signature
from checkpoint.engine.plan import TensorSpec, Write, deal_pieces
from checkpoint.format.box import runs_of
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Box, Part

EAGER_CHUNK_BYTES = 128 << 10  # copying so little takes no longer than watching over it
EAGER_BYTES = 8 << 20  # of a share; what the staging buffers take, and at most 1 or 2 ms of the loop's time


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a chunk is read: `box` of the rank's own tensor of leaf number `leaf`.

    `first` is its first element in that tensor, if the chunk is one run of it in row-major order.
    """

    leaf: int
    box: Box
    first: int | None


@dataclass(frozen=True, slots=True)
class Structure:
    """One rank's share of a state. The first `num_eager` slots, `eager_bytes` long, are copied by `save`.

    `key` is all that it was made from; `described` is the tensors' part of the content's digest.
    """

    key: tuple[int, int, tuple[Signature, ...]]
    specs: tuple[TensorSpec, ...]
    described: str
    slots: tuple[Slot, ...]
    origins: tuple[Origin, ...]
    devices: tuple[str, ...]
    num_eager: int
    eager_bytes: int


def plan_structure(key: tuple[int, int, tuple[Signature, ...]], leaves: Sequence[Leaf]) -> Structure:
    """Decide what the rank of `key` = (rank, size, signatures) writes of the leaves, and where to."""
    rank, size, _ = key
    specs = tuple(leaf.spec for leaf in leaves)
    pieces = [piece for number, leaf in enumerate(leaves) for piece in leaf.pieces(number, size)]
    mine = [write for write in deal_pieces(specs, pieces) if write.writer == rank]
    parts = {write.tensor: leaves[write.tensor].parts(rank) for write in mine}
    origins = [_origin(write, parts[write.tensor]) for write in mine]
    sizes = [write.box.numel * itemsize(specs[write.tensor].dtype) for write in mine]
    is_whole = [[part.box for part in parts[write.tensor]] == [write.box] for write in mine]
    eager = _choose_eager(mine, sizes, is_whole, specs)
    device = {number: leaves[mine[number].tensor].device for number in eager}
    order = [*sorted(eager, key=lambda number: (device[number], number))]
    order += [number for number in range(len(mine)) if number not in eager]
    slots: list[Slot] = []
    offset = eager_bytes = 0
    for number in order:
        slots.append(Slot(mine[number].tensor, mine[number].box, offset, sizes[number]))
        offset = aligned(offset + sizes[number])
        eager_bytes = offset if number in eager else eager_bytes
    return Structure(
        key,
        specs,
        json.dumps([[spec.name, spec.dtype, spec.shape] for spec in specs], separators=(",", ":")),
        tuple(slots),
        tuple(origins[number] for number in order),
        tuple(leaf.device for leaf in leaves),
        len(eager),
        eager_bytes,
    )


def _origin(write: Write, parts: Sequence[Part]) -> Origin:
    """Find a chunk in the rank's own tensor, which holds `parts` of the whole one."""
    part = next(one for one in parts if write.box.intersect(one.box) == write.box)
    box = write.box.moved(part.box.start, part.local.start)
    shape = tuple(max(stop) for stop in zip(*(one.local.stop for one in parts), strict=True))
    run, first = next(runs_of(box, shape))
    return Origin(write.tensor, box, first if run.size == box.size else None)


def _choose_eager(
    writes: Sequence[Write], sizes: Sequence[int], is_whole: Sequence[bool], specs: Sequence[TensorSpec]
) -> set[int]:
    """Choose the chunks to copy at once: small ones that are all that the rank has of a tensor."""
    small = [
        number
        for number, write in enumerate(writes)
        if sizes[number] <= EAGER_CHUNK_BYTES
        and is_whole[number]
        and not specs[write.tensor].dtype.startswith("complex")  # may be conjugated only on paper
    ]
    chosen: set[int] = set()
    total = 0
    for number in sorted(small, key=lambda one: sizes[one]):
        total += aligned(sizes[number])
        if total > EAGER_BYTES:
            break
        chosen.add(number)
    return chosen


def host_bytes(leaves: Sequence[Leaf], hosts: Sequence[str], host: str) -> int:
    """Return the room that one snapshot takes in the arena of a host: the shares of all of its ranks."""
    specs = tuple(leaf.spec for leaf in leaves)
    pieces = [piece for number, leaf in enumerate(leaves) for piece in leaf.pieces(number, len(hosts))]
    sizes = (
        aligned(write.box.numel * itemsize(specs[write.tensor].dtype))
        for write in deal_pieces(specs, pieces)
        if hosts[write.writer] == host
    )
    return sum(sizes)
