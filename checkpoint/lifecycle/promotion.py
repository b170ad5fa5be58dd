"""Promotion: one checkpoint copied from a store to another, where it exists whole or not at all."""

import mmap
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from checkpoint.engine.bounds import check_step, check_store
from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.engine.sweeps import look_up
from checkpoint.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    FormatError,
    NoCheckpoint,
    NotFound,
    StoreUnavailable,
)
from checkpoint.format.codec import checksum
from checkpoint.format.keys import manifest_key, promoting_key
from checkpoint.format.manifest import Manifest, PackRef, decode_manifest
from checkpoint.lifecycle.marks import copy_score
from checkpoint.lifecycle.proof import has_same_index, prove_object
from checkpoint.lifecycle.survey import ObjectRef, digest_of, objects_of
from checkpoint.store.contract import Buffer, ByteRange, Store

MAX_HELD_BYTES = 128 << 20  # a larger object is not held in memory
_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PromoteReport:
    """What a promotion copied; `num_shared` objects were on the target already.

    `is_new` tells whether this call created the checkpoint there.
    """

    step: int
    source: str
    target: str
    is_new: bool
    num_copied: int
    num_bytes: int
    num_shared: int


def promote(source: Store, target: Store, step: int) -> PromoteReport:
    """Copy a checkpoint to another store, so that it exists there once all of its bytes do.

    Packs and pages that the target lacks go first, those of earlier checkpoints that it shares among them,
    each proved before it is written; the manifest goes last, only if absent, and is read back. What is there
    already is held against the source's index. May be broken off anywhere and called again. Holds one object
    of at most 128 MiB at a time; larger ones go through a temporary file.

    Raises NoCheckpoint if the source lacks the checkpoint, or prunes it meanwhile; Corrupt naming what of it
    is damaged; Conflict if the target has something else in its place; StoreUnavailable if a store fails or
    the target is just being pruned: try again later.
    """
    check_store("source", source)
    check_store("target", target)
    check_step(step)
    manifest, data = read_manifest(source, step)
    if _is_there(target, manifest, data):
        return PromoteReport(step, str(source), str(target), False, 0, 0, len(objects_of(manifest)))
    announcement = promoting_key(step, digest_of(data))
    target.put(announcement, data)
    try:
        missing = _missing(source, target, manifest, announcement)
        for ref in missing:
            with fetched(source, ref) as content:
                prove_object(ref, content)
                _write(source, target, ref, content)
    except Corrupt as error:
        if step in Catalog(source).steps():
            raise
        raise NoCheckpoint(
            f"the checkpoint of step {step} in {source} expired while it was promoted"
        ) from error
    copy_score(source, target, step, digest_of(data))
    if missing and not target.list(announcement):
        raise StoreUnavailable(f"step {step} was promoted to {target} by somebody else as well: look again")
    is_new = _create(target, manifest, data)
    target.delete(announcement)
    num_bytes = sum(ref.num_bytes for ref in missing)
    num_shared = len(objects_of(manifest)) - len(missing)
    return PromoteReport(step, str(source), str(target), is_new, len(missing), num_bytes, num_shared)


@contextmanager
def fetched(store: Store, ref: ObjectRef) -> Iterator[Buffer]:
    """Hold an object's bytes: in memory, or in a temporary file if they are many.

    Raises Corrupt if the object is missing or not of its length.
    """
    if ref.num_bytes <= MAX_HELD_BYTES:
        yield _read(store, ref)
        return
    with tempfile.TemporaryFile(prefix="holdfast-") as file:
        for offset in range(0, ref.num_bytes, _PART_BYTES):
            part = ByteRange(offset, min(_PART_BYTES, ref.num_bytes - offset))
            file.write(_read(store, ref, part))
        file.flush()
        yield memoryview(mmap.mmap(file.fileno(), ref.num_bytes, prot=mmap.PROT_READ))


def _read(store: Store, ref: ObjectRef, part: ByteRange | None = None) -> Buffer:
    wanted = ByteRange(0, ref.num_bytes) if part is None else part
    try:
        data = store.read(ref.key, None if part is None else [part])[0]
    except NotFound as error:
        raise Corrupt(f"{ref.key} is missing in {store}, or was cut short: {error}") from error
    if memoryview(data).nbytes != wanted.num_bytes:
        raise Corrupt(f"{ref.key} in {store} gave {memoryview(data).nbytes} of {wanted.num_bytes} bytes")
    return data


def _is_there(target: Store, manifest: Manifest, data: Buffer) -> bool:
    """Whether the target has this checkpoint, or one of equal content. Raises Conflict if it has another."""
    key = manifest_key(manifest.step)
    try:
        standing = target.read(key)[0]
    except NotFound:
        return False
    if bytes(standing) == bytes(data):
        return True
    try:
        found = decode_manifest(standing, key)
    except FormatError as error:
        raise Conflict(
            f"{target} has a {key} that cannot be read ({error}): repair it or set it aside first"
        ) from error
    if _told(found) == _told(manifest):
        return True
    raise Conflict(
        f"{target} has another checkpoint of step {manifest.step} (run {found.run!r}, generation "
        f"{found.generation}) than is to be promoted: give each run a store of its own"
    )


def _told(manifest: Manifest) -> tuple[object, ...]:
    """Return all that a checkpoint says, wherever its chunks lie."""
    books = manifest.data_cursor, dict(manifest.metrics)
    return manifest.tensors, manifest.skeleton, manifest.run, *books


def _missing(source: Store, target: Store, manifest: Manifest, announcement: str) -> list[ObjectRef]:
    """List what the target lacks, and prove that what it has is the same."""
    objects = objects_of(manifest)
    footing = look_up(target, [(ref.key, ref.num_bytes) for ref in objects], [announcement])
    if footing.going:
        raise StoreUnavailable(f"{target} is just being pruned ({footing}): promote again later")
    if footing.changed:
        raise _another(target, str(footing))
    there = {ref.key: ref for ref in objects if ref.key not in footing.gone}
    for key in there.keys() - _vouched(source, target, there.keys()):
        ref = there[key]
        if not _is_same(source, target, ref):
            raise _another(target, f"{key} lists other chunks")
    return [ref for ref in objects if ref.key not in there]


def _write(source: Store, target: Store, ref: ObjectRef, content: Buffer) -> None:
    """Write an object; somebody else may have promoted the same meanwhile."""
    try:
        target.put_new(ref.key, content)
    except AlreadyExists:
        if not _is_same(source, target, ref):
            raise _another(target, f"{ref.key} lists other chunks") from None


def _is_same(source: Store, target: Store, ref: ObjectRef) -> bool:
    """Whether what the target has lists the same chunks; of a pack, the ends are compared."""
    if not isinstance(ref, PackRef):
        return checksum(target.read(ref.key)[0]) == ref.checksum
    try:
        return has_same_index(source, target, ref)
    except NotFound as error:
        raise Corrupt(f"{ref.key} is not there any more, or was cut short: {error}") from error


def _vouched(source: Store, target: Store, keys: Collection[str]) -> set[str]:
    """Return those keys that checkpoints name which are the same on both stores."""
    vouched: set[str] = set()
    both = set(Catalog(source).steps()) & set(Catalog(target).steps())
    for step in sorted(both, reverse=True):
        if vouched >= set(keys):
            break
        try:
            data = target.read(manifest_key(step))[0]
            if bytes(source.read(manifest_key(step))[0]) == bytes(data):
                vouched |= {ref.key for ref in objects_of(decode_manifest(data, manifest_key(step)))}
        except (NotFound, FormatError):
            continue  # pruned since, or no witness
    return vouched


def _another(target: Store, what: str) -> Conflict:
    return Conflict(
        f"{target} has something else in the place of what is to be promoted: {what}. "
        "Give each run a store of its own; what an earlier run left over, a prune removes"
    )


def _create(target: Store, manifest: Manifest, data: Buffer) -> bool:
    """Create the manifest, or find that an equal one was created meanwhile; read back what stands."""
    key = manifest_key(manifest.step)
    try:
        target.put_new(key, data)
    except AlreadyExists:
        _is_there(target, manifest, data)
        return False
    if bytes(target.read(key)[0]) != bytes(data):
        raise Conflict(f"{key} does not read back as it was written: {target} takes no conditional writes")
    return True
