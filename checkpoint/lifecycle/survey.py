"""What a store holds, read once for those who judge: every manifest, its digest, and the objects it names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkpoint.engine.catalog import read_manifest
from checkpoint.errors import FormatError, NoCheckpoint, Unsupported
from checkpoint.format.codec import checksum
from checkpoint.format.keys import MANIFESTS, parse_manifest_key
from checkpoint.format.manifest import Manifest, PackRef, PageRef
from checkpoint.store.contract import Buffer, Entry, Store

ObjectRef = PackRef | PageRef


@dataclass(frozen=True, slots=True)
class Standing:
    """A checkpoint that exists; `digest` is of its manifest's bytes, `entry` the line it was listed by."""

    manifest: Manifest
    digest: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Survey:
    """The checkpoints whose manifests can be read, by step, oldest first; and why others cannot."""

    standing: Mapping[int, Standing]
    problems: tuple[str, ...]


def survey(store: Store) -> Survey:
    """Read all manifests of a store."""
    standing, problems = {}, []
    for step, entry in list_manifests(store).items():
        try:
            manifest, data = read_manifest(store, step)
        except NoCheckpoint:
            continue  # deleted since it was listed
        except Unsupported as error:
            problems.append(str(error))  # a later release's, which says what to do
        except FormatError as error:
            problems.append(f"{error}: restore or remove this one")
        else:
            standing[step] = Standing(manifest, digest_of(data), entry)
    return Survey(standing, tuple(problems))


def list_manifests(store: Store) -> dict[int, Entry]:
    """Return the entries of a store's manifests by step, oldest first."""
    found = ((parse_manifest_key(entry.key), entry) for entry in store.list(MANIFESTS))
    return dict(sorted((step, entry) for step, entry in found if step is not None))


def digest_of(data: Buffer) -> str:
    """Return what keys tell manifests apart by."""
    return checksum(data).hex()[:16]


def objects_of(manifest: Manifest) -> tuple[ObjectRef, ...]:
    """Return the packs and pages that a manifest names."""
    return (*manifest.packs, *manifest.pages)


def named_by(standing: Iterable[Standing]) -> set[str]:
    """Return the keys of all objects that some checkpoints need."""
    return {ref.key for one in standing for ref in objects_of(one.manifest)}
