"""The catalog: which checkpoints a store holds, computed from its manifests and nothing else."""

from checkpoint.errors import Corrupt, FormatError, NoCheckpoint, NoSuchStep, NotFound
from checkpoint.format.keys import MANIFESTS, manifest_key, parse_manifest_key
from checkpoint.format.manifest import Manifest, decode_manifest
from checkpoint.store.contract import Buffer, Store


class Catalog:
    """Reads a store's manifests. It keeps nothing: each answer is as new as the store's listing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def steps(self) -> list[int]:
        """List the steps that have a manifest, oldest first."""
        steps = (parse_manifest_key(entry.key) for entry in self._store.list(MANIFESTS))
        return sorted(step for step in steps if step is not None)

    def check_named(self, *named: int) -> None:
        """Raise NoSuchStep if a step that was named has no manifest."""
        there = self.steps()
        missing = sorted(set(named) - set(there))
        if missing:
            listed = ", ".join(map(str, there)) or "none"
            raise NoSuchStep(f"{self._store} has no checkpoint of step {missing[0]}; it has: {listed}")

    def manifest(self, step: int) -> Manifest:
        """Read one manifest. Raises NoCheckpoint if there is none of this step, Corrupt if it is damaged."""
        return read_manifest(self._store, step)[0]

    def latest(self) -> int | None:
        """Return the newest step whose manifest can be read, None when there is no such checkpoint.

        Whether there are others, damaged or of a later version, `steps` tells.
        """
        newest = self.newest()
        return None if newest is None else newest.step

    def newest(self) -> Manifest | None:
        """Read the newest manifest that can be read, None when there is none."""
        for step in reversed(self.steps()):
            try:
                return self.manifest(step)
            except (FormatError, NoCheckpoint):
                continue  # `load` names it among the fallbacks; `verify` says what is wrong with it
        return None


def read_manifest(store: Store, step: int) -> tuple[Manifest, Buffer]:
    """Read a step's manifest, and its bytes. Raises NoCheckpoint, Corrupt, Unsupported."""
    key = manifest_key(step)
    try:
        data = store.read(key)[0]
    except NotFound as error:
        raise NoCheckpoint(f"there is no checkpoint of step {step} in {store}: no {key}") from error
    manifest = decode_manifest(data, f"{key} in {store}")
    if manifest.step != step:
        raise Corrupt(
            f"{key} says it is of step {manifest.step}: it was moved or edited; delete or restore it"
        )
    return manifest, data
