"""Resharding: the same tensors as the chunks of another layout, or in another type, or some of them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import AlreadyExists, Mismatch
from checkpoint.format.codec import checksum
from checkpoint.format.dtypes import itemsize
from checkpoint.format.layout import Layout
from checkpoint.format.manifest import Manifest, encode_manifest, metrics_to_json
from checkpoint.format.notation import layout_to_json
from checkpoint.format.scheme import format_layout, parse_layout
from checkpoint.format.tree import leaf_names
from checkpoint.interop.conversion.batches import batches_of, most_held_bytes, wishes_of
from checkpoint.interop.conversion.casting import (
    FLOATS,
    Cast,
    Reach,
    bands_of,
    note_uncast,
    parse_dtype,
    reference_fingerprint,
)
from checkpoint.interop.conversion.contract import (
    Array,
    ConversionReport,
    ConversionSettings,
    GlobalTensors,
    Listener,
    Progress,
    Proof,
    Wish,
    unheard,
)
from checkpoint.interop.conversion.finding import check_own
from checkpoint.interop.conversion.measuring import high_water_bytes
from checkpoint.interop.conversion.roles import lay_out, pieces_of
from checkpoint.interop.conversion.ruled import (
    SIZES,
    RuleChoice,
    knowing,
    model_sizes,
    placements_by,
    sizes_in,
)
from checkpoint.interop.conversion.skeletons import matches, nothing_fits, select
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.conversion.writing import Draft, most_stored_bytes, write_checkpoint
from checkpoint.interop.formats.hf_config import retyped
from checkpoint.store.contract import Store

ONE_RANK = "replica=1"


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a checkpoint.

    Its chunks are cut for the layout `to`, with the placements that `rules` tell, if they are given. `dtype`
    is what the model's floating-point tensors are cast to; an optimizer's state is left as it is, since the
    full precision of its moments and master weights is what it is kept for. `only` is a glob of names.
    """

    to: str = ONE_RANK
    dtype: str | None = None
    only: str | None = None
    rules: RuleChoice | None = None


class Chosen:
    """Some of other global tensors, in their order."""

    def __init__(self, source: GlobalTensors, names: Sequence[str]) -> None:
        wanted = set(names)
        self._source = source
        self._numbers = [number for number, spec in enumerate(source.tensors) if spec.name in wanted]
        self.tensors: Sequence[TensorSpec] = [source.tensors[number] for number in self._numbers]

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return the bits of boxes."""
        return self._source.read(self.wishes(wishes))

    def wishes(self, wishes: Sequence[Wish]) -> list[Wish]:
        """Return boxes as the source counts its tensors."""
        return [(self._numbers[number], box) for number, box in wishes]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A conversion worked out: what is read, what it becomes, and where that lies."""

    source: Stored
    chosen: Chosen
    contents: Cast
    layout: Layout
    draft: Draft
    notes: tuple[str, ...]

    @property
    def changed(self) -> dict[str, str]:
        """The new dtype of each tensor that is cast."""
        pairs = zip(self.chosen.tensors, self.contents.tensors, strict=True)
        return {new.name: new.dtype for old, new in pairs if old.dtype != new.dtype}


def reshard(
    source: Store,
    target: Store,
    change: Change,
    *,
    step: int | None = None,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Write the checkpoint of a step (or the newest) to another store, cut for another layout.

    Each tensor is proved before the manifest is created: its fingerprint is the source's, or, if it was cast,
    that of the cast done anew by simpler code. May be broken off anywhere and called again.

    Raises NoCheckpoint, Corrupt if a chunk of the source is damaged, FormatError for a change that cannot be,
    AlreadyExists if the target has another checkpoint of the step.
    """
    settings = settings or ConversionSettings()
    began_s, before = time.monotonic(), high_water_bytes()
    plan = _plan(source, change, step)
    if (proved := _present(target, plan, reach := Reach())) is not None:
        return _already_there(target, plan, settings, proved, reach)
    proofs: list[Proof] = []
    notes = list(plan.notes)

    def check(found: Mapping[str, int]) -> None:
        proofs.extend(_prove(plan, found, reach := Reach(), listener))
        notes.extend(reach.settle(settings.overflow))

    written = write_checkpoint(
        target, plan.draft, plan.contents, settings=settings, check=check, listener=listener
    )
    return replace(
        _report(target, plan, settings, written.manifest),
        num_chunks=written.num_chunks,
        read_bytes=plan.source.read_bytes,
        written_bytes=written.stored_bytes,
        num_resumed_bytes=written.num_resumed_bytes,
        grown_bytes=high_water_bytes() - before,
        seconds=time.monotonic() - began_s,
        proofs=tuple(proofs),
        notes=tuple(notes),
    )


def plan_reshard(
    source: Store,
    target: Store,
    change: Change,
    *,
    step: int | None = None,
    settings: ConversionSettings | None = None,
) -> ConversionReport:
    """Tell what `reshard` would do: the bytes that it would read, and write at most, and its peak memory."""
    settings = settings or ConversionSettings()
    plan = _plan(source, change, step)
    if (proved := _present(target, plan, reach := Reach())) is not None:
        return replace(_already_there(target, plan, settings, proved, reach), is_dry=True)
    cuts = plan.draft.cuts
    reads = [wishes_of(batch) for batch in batches_of(cuts, settings.batch_bytes)]
    for number, spec in enumerate(plan.chosen.tensors):
        if spec.name in plan.changed:
            reads += [[(number, band)] for band in bands_of(spec)]
    read = sum(plan.source.foreseen_bytes(plan.chosen.wishes(wishes)) for wishes in reads)
    return replace(
        _report(target, plan, settings, plan.source.manifest),
        num_chunks=len(cuts),
        read_bytes=read,
        written_bytes=most_stored_bytes(plan.draft, settings),
        is_dry=True,
        is_exact=False,
        notes=plan.notes,
    )


def layout_meta(layout: Layout, scheme: str) -> dict[str, object]:
    """Return what a manifest's meta says of the layout that its chunks are cut for."""
    return {"layout": {"scheme": scheme, **layout_to_json(layout)}}  # type: ignore[dict-item]


def _plan(store: Store, change: Change, step: int | None) -> _Plan:
    source = Stored(store, step)
    manifest = source.manifest
    keeps = matches(change.only)
    skeleton = select(manifest.skeleton, keeps)
    names = list(dict.fromkeys(leaf_names(skeleton)))
    if not names:
        raise nothing_fits(change.only, manifest.step, str(store))
    chosen = Chosen(source, names)
    dtype = None if change.dtype is None else parse_dtype(change.dtype)
    contents = Cast(chosen, _casts(chosen.tensors, dtype))
    scheme = parse_layout(change.to)
    specs = tuple(contents.tensors)
    rules = None if change.rules is None else knowing(change.rules, sizes_in(manifest))
    on = None if rules is None else placements_by(rules, specs, scheme)
    layout = lay_out(specs, scheme, on)
    sizes = model_sizes(sizes_in(manifest), {} if change.rules is None else change.rules.sizes)
    config = skeleton.get("config") if isinstance(skeleton, dict) else None
    if dtype is not None and isinstance(skeleton, dict) and isinstance(config, dict):
        skeleton = {**skeleton, "config": retyped(config, dtype)}
    meta = {
        **manifest.meta,
        **layout_meta(layout, format_layout(scheme)),
        **({SIZES: sizes} if sizes else {}),
        "converted": {"by": "reshard", "from": str(store), "changed": sorted(_casts(chosen.tensors, dtype))},
        "spec_digest": manifest.spec_digest,
        "data_cursor": manifest.data_cursor,
        "metrics": metrics_to_json(manifest.metrics),
    }
    origin = checksum(encode_manifest(manifest)).hex()
    pieces = tuple(pieces_of(layout, specs))
    widths = tuple(itemsize(spec.dtype) for spec in chosen.tensors)
    draft = Draft(manifest.run, manifest.step, specs, skeleton, meta, pieces, origin, widths)
    notes = tuple(note_uncast(chosen.tensors, change.dtype))
    return _Plan(source, chosen, contents, layout, draft, notes)


def _casts(specs: Sequence[TensorSpec], dtype: str | None) -> dict[str, str]:
    return {
        spec.name: dtype
        for spec in specs
        if dtype is not None and spec.dtype in FLOATS and spec.dtype != dtype and _is_weight(spec.name)
    }


def _is_weight(name: str) -> bool:
    return name.startswith("model/")


def _already_there(
    target: Store, plan: _Plan, settings: ConversionSettings, proofs: Sequence[Proof], reach: Reach
) -> ConversionReport:
    """Return the report of a conversion that was done before; only what proves casts was read for it."""
    return replace(
        _report(target, plan, settings, plan.source.manifest),
        read_bytes=plan.source.read_bytes,
        is_new=False,
        proofs=tuple(proofs),
        notes=(*plan.notes, *reach.settle(settings.overflow)),
    )


def _present(target: Store, plan: _Plan, reach: Reach) -> list[Proof] | None:
    """Prove the checkpoint if the target has it. Raises AlreadyExists if it has another of the step."""
    check_own(target)
    if plan.draft.step not in Catalog(target).steps():
        return None
    found = Catalog(target).manifest(plan.draft.step)
    specs = tuple(TensorSpec(one.name, one.dtype, one.shape) for one in found.tensors)
    meta = plan.draft.meta
    is_same = specs == plan.draft.tensors and found.skeleton == plan.draft.skeleton
    if (
        is_same
        and found.meta.get("layout") == meta["layout"]
        and found.meta.get("converted") == meta["converted"]
    ):
        return _prove(plan, {one.name: one.fingerprint for one in found.tensors}, reach, unheard)
    raise AlreadyExists(
        f"{target} has another checkpoint of step {plan.draft.step} (run {found.run!r}): "
        "give a store of its own, nothing is overwritten"
    )


def _prove(plan: _Plan, found: Mapping[str, int], reach: Reach, listener: Listener) -> list[Proof]:
    """Hold what was written against the source. Raises Mismatch naming the tensors that differ."""
    known = {one.name: one.fingerprint for one in plan.source.manifest.tensors}
    changed = plan.changed
    specs = plan.contents.tensors
    proofs, wrong = [], []
    for number, spec in enumerate(specs):
        how, wanted = "fingerprint", known[spec.name]
        if spec.name in changed:
            how = "reference"
            wanted = reference_fingerprint(
                plan.chosen, number, new=spec.dtype, known=known[spec.name], reach=reach
            )
            listener(Progress(f"proving {spec.name}", number, len(specs)))
        if found[spec.name] != wanted:
            wrong.append(spec.name)
        proofs.append(Proof(spec.name, how, found[spec.name]))
    if wrong:
        raise Mismatch(
            f"the content of {len(wrong)} of {len(proofs)} tensors differs from the source's: {wrong[:5]}; "
            "nothing was committed"
        )
    return proofs


def _report(target: Store, plan: _Plan, settings: ConversionSettings, manifest: Manifest) -> ConversionReport:
    specs = plan.draft.tensors
    return ConversionReport(
        source=str(plan.draft.meta["converted"]["from"]),
        target=str(target),
        step=manifest.step,
        layout=str(plan.draft.meta["layout"]["scheme"]),
        num_tensors=len(specs),
        num_chunks=0,
        num_bytes=sum(num_bytes_of(spec) for spec in specs),
        read_bytes=0,
        written_bytes=0,
        peak_bytes=most_held_bytes(plan.draft.cuts, settings),
    )


def num_bytes_of(spec: TensorSpec) -> int:
    """Return how many bytes a tensor's elements take."""
    return math.prod(spec.shape) * itemsize(spec.dtype)
