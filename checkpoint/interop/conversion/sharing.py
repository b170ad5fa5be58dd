"""What one rank of a layout would read of a stored checkpoint: which packs, how many ranges and bytes. Pure
arithmetic over the index; its time grows with the chunks, and not with the ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoint.engine.foreseeing import Asked, foresee
from checkpoint.engine.plan import TensorSpec, plan_copies
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.regions import Regions
from checkpoint.engine.source import StoreSource
from checkpoint.errors import Misuse
from checkpoint.format.dtypes import itemsize
from checkpoint.format.flat import share_of
from checkpoint.format.manifest import Manifest
from checkpoint.format.scheme import format_layout, parse_layout
from checkpoint.format.table import ChunkTable
from checkpoint.interop.conversion.finding import index_of, manifest_of
from checkpoint.interop.conversion.roles import lay_out
from checkpoint.interop.conversion.ruled import RuleChoice, knowing, placements_by, sizes_in
from checkpoint.store.contract import Store

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackShare:
    """What a rank reads of one pack."""

    key: str
    num_ranges: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RankShare:
    """What a rank reads: `num_bytes` raw ones are its own, and lie in chunks of `stored_bytes`.

    Of these a restore reads `read_bytes` in `num_ranges`: blocks alone where few are wanted of a chunk, with
    their sums, and the gaps that a request rather reads over.
    """

    step: int
    layout: str
    rank: int
    num_ranks: int
    num_tensors: int
    num_boxes: int
    num_bytes: int
    num_chunks: int
    stored_bytes: int
    read_bytes: int
    num_ranges: int
    packs: tuple[PackShare, ...]


def plan_rank(
    manifest: Manifest,
    table: ChunkTable,
    to: str,
    rank: int,
    *,
    rules: RuleChoice | None = None,
    can_read_into: Callable[[int], bool] = lambda _: False,
) -> RankShare:
    """Work out what a rank of a layout would read. Raises Misuse if the layout has no such rank.

    `can_read_into` tells of a pack whether its store reads into the memory of whoever asks.
    """
    scheme = parse_layout(to)
    if not 0 <= rank < scheme.mesh.size:
        raise Misuse(f"the layout {to!r} has the ranks 0 to {scheme.mesh.size - 1}, not {rank}")
    specs = [TensorSpec(one.name, one.dtype, one.shape) for one in manifest.tensors]
    rules = None if rules is None else knowing(rules, sizes_in(manifest))
    layout = lay_out(specs, scheme, None if rules is None else placements_by(rules, specs, scheme))
    share = share_of(layout, {spec.name: spec.shape for spec in specs}, rank)
    numbered = [
        (number, part.box)
        for number, spec in enumerate(specs)
        for part in share[spec.name]
        if not part.box.is_empty
    ]
    wanted = Regions.of([box for _, box in numbered], [number for number, _ in numbered])
    sizes = np.array([itemsize(spec.dtype) for spec in specs], np.int64)
    chunks = np.unique(plan_copies(Regions.of_table(table), wanted).left)
    asked = foresee(manifest, table, wanted=wanted, can_read_into=can_read_into, policy=ReadPolicy())
    packs = _by_pack(manifest, asked)
    return RankShare(
        manifest.step,
        format_layout(scheme),
        rank,
        scheme.mesh.size,
        len({number for number, _ in numbered}),
        len(numbered),
        int((wanted.numels * sizes[wanted.tensors]).sum()) if numbered else 0,
        len(chunks),
        int(table.rows["num_bytes"][_with_bases(table, chunks)].astype(np.int64).sum()),
        sum(one.num_bytes for one in packs),
        sum(one.num_ranges for one in packs),
        packs,
    )


def share_of_rank(
    store: Store, to: str, rank: int, *, step: int | None = None, rules: RuleChoice | None = None
) -> RankShare:
    """Work out what a rank of a layout would read of the checkpoint of a step, or of the newest."""
    manifest = manifest_of(store, step)
    source = StoreSource(store)
    return plan_rank(
        manifest, index_of(store, manifest), to, rank, rules=rules, can_read_into=source.can_read_into
    )


def _with_bases(table: ChunkTable, chunks: Rows) -> Rows:
    """Return the rows of chunks, and of the bases that deltas need."""
    is_needed = np.zeros(len(table), np.bool_)
    is_needed[chunks] = True
    return np.flatnonzero(is_needed[table.owners()])


def _by_pack(manifest: Manifest, asked: Iterable[Asked]) -> tuple[PackShare, ...]:
    found: dict[int, list[int]] = {}
    for pack, at in asked:
        found.setdefault(pack, []).append(at.num_bytes)
    return tuple(
        PackShare(manifest.packs[pack].key, len(sizes), sum(sizes)) for pack, sizes in sorted(found.items())
    )
