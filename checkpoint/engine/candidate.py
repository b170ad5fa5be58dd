"""The checkpoint of one step, as several sources have it: what one cannot give is asked of the next."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from checkpoint.engine.asking import ask_for_steps
from checkpoint.engine.filling import Filling, Opened, deal_copies
from checkpoint.engine.plan import check_chunks
from checkpoint.engine.reading import Holes, ReadPolicy, Tally
from checkpoint.engine.regions import Column
from checkpoint.engine.source import Source
from checkpoint.engine.targets import Target
from checkpoint.errors import (
    CheckpointError,
    Corrupt,
    FormatError,
    Incomplete,
    NoCheckpoint,
    StoreUnavailable,
    Unsupported,
)
from checkpoint.format.codec import checksum
from checkpoint.format.manifest import Manifest
from checkpoint.format.table import ChunkTable


class Sources:
    """The sources of one restore, the nearest first, and which of them were found to be out of reach."""

    def __init__(self, sources: Sequence[Source], tally: Tally) -> None:
        self._all = tuple(sources)
        self._tally = tally
        self.outages: dict[int, StoreUnavailable] = {}

    def steps(self, policy: ReadPolicy) -> list[int]:
        """List the steps that any source has, newest first. Raises StoreUnavailable as `ask_for_steps`."""
        answers = ask_for_steps(self._all, policy)
        for number, error in answers.outages.items():
            self.lose(number, error)
        return answers.steps

    @property
    def unreached(self) -> tuple[str, ...]:
        """The names of those that are asked no more."""
        return tuple(self._all[number].name for number in sorted(self.outages))

    def reachable(self) -> Iterator[tuple[int, Source]]:
        """Yield the number and the source of those that have answered so far."""
        for number, source in enumerate(self._all):
            if number not in self.outages:
                yield number, source

    def lose(self, number: int, error: StoreUnavailable) -> None:
        """Ask a source no more."""
        self.outages[number] = error
        self._tally.note(self._all[number].name, "the source", f"{type(error).__name__}: {error}")


class Candidate:
    """The checkpoint of one step. Every source that has it is asked twice before it is given up.

    The second time is for what went wrong on the way: to give up a good checkpoint is dear. A source whose
    checkpoint of the step holds other tensors, or other content, than the first one's is left out.
    """

    def __init__(self, step: int, sources: Sources, tally: Tally) -> None:
        self.step = step
        self._sources = sources
        self._tally = tally
        self._manifests: dict[int, Manifest | None] = {}
        self._tables: list[tuple[Manifest, frozenset[int], ChunkTable]] = []
        self._errors: list[CheckpointError] = []

    @property
    def manifest(self) -> Manifest:
        """The manifest of the nearest source that can show it.

        Raises what is wrong with it otherwise: NoCheckpoint, Unsupported, Corrupt, StoreUnavailable.
        """
        for _, _, manifest in self._opened():
            return manifest
        raise self._error()

    def check_index(self, tensors: Collection[int]) -> None:
        """Prove that chunks cover some tensors exactly once. Raises Corrupt, Incomplete, StoreUnavailable."""
        for number, source, manifest in self._opened():
            if self._table(number, source, manifest, frozenset(tensors)) is not None:
                return
        raise self._error()

    def fill(self, holes: Holes, targets: Sequence[Target], policy: ReadPolicy) -> None:
        """Fill the holes in some targets, each chunk from the nearest source that has a good copy.

        Raises Corrupt, Incomplete or StoreUnavailable if none has: what the targets hold then is undefined.
        """
        tensors = frozenset(np.unique(holes.regions.tensors).tolist())
        for number, source, manifest in self._opened():
            if not len(holes):
                return
            table = self._table(number, source, manifest, tensors)
            if table is None:
                continue
            filling = Filling(Opened(source, manifest, table), targets, policy, self._tally)
            holes, failure = filling.fill(holes)
            if failure is not None:
                self._sources.lose(number, failure)
            elif len(holes):
                self._errors.append(self._tally.last())
        if len(holes):
            raise self._error()

    def deal(self, holes: Holes, num_ranks: int) -> tuple[Holes, Column]:
        """Deal holes to ranks, chunk by chunk, each rank neighbours of about as many bytes; see `Circle`."""
        tensors = frozenset(np.unique(holes.regions.tensors).tolist())
        for number, source, manifest in self._opened():
            table = self._table(number, source, manifest, tensors)
            if table is not None:
                return deal_copies(table, holes, num_ranks)
        raise self._error()

    def _opened(self) -> Iterator[tuple[int, Source, Manifest]]:
        """Yield the sources that have the checkpoint, and their manifests; each up to twice."""
        first = next((known for known in self._manifests.values() if known is not None), None)
        for _ in range(2):
            for number, source in list(self._sources.reachable()):
                manifest = self._manifest(number, source)
                if manifest is None:
                    continue
                first = first or manifest
                if manifest is not first and _content(manifest) != _content(first):
                    self._manifests[number] = None
                    self._tally.note(
                        source.name, f"the manifest of step {self.step}", "it is of other content"
                    )
                    continue
                yield number, source, manifest

    def _manifest(self, number: int, source: Source) -> Manifest | None:
        if number not in self._manifests:
            try:
                self._manifests[number] = source.manifest(self.step)
            except NoCheckpoint as error:
                self._manifests[number] = None
                self._errors.append(error)
            except FormatError as error:
                self._failed(source, f"the manifest of step {self.step}", error)
            except StoreUnavailable as error:
                self._sources.lose(number, error)
        return self._manifests.get(number)

    def _table(
        self, number: int, source: Source, manifest: Manifest, tensors: frozenset[int]
    ) -> ChunkTable | None:
        """Return the proved index of some tensors; that of an equal manifest will do."""
        for known, covered, table in self._tables:
            if tensors <= covered and (known is manifest or known == manifest):
                return table
        try:
            table = source.chunks(manifest, None if len(tensors) == len(manifest.tensors) else tensors)
            prove_index(manifest, table, tensors)
        except (FormatError, Incomplete) as error:
            self._failed(source, f"the index of step {self.step}", error)
            return None
        except StoreUnavailable as error:
            self._sources.lose(number, error)
            return None
        self._tables.append((manifest, tensors, table))
        return table

    def _failed(self, source: Source, item: str, error: CheckpointError) -> None:
        self._errors.append(error)
        self._tally.note(source.name, item, error)

    def _error(self) -> CheckpointError:
        """Return what tells most: a version to upgrade for, an outage that may pass, or the first defect."""
        for error in self._errors:
            if isinstance(error, Unsupported):
                return error
        for outage in self._sources.outages.values():
            return outage
        found = [error for error in self._errors if not isinstance(error, NoCheckpoint)] or self._errors
        return found[0] if found else NoCheckpoint(f"no source has a checkpoint of step {self.step}")


def content_digest(manifest: Manifest) -> bytes:
    """Return the same bytes for checkpoints of the same content, however it is stored."""
    return checksum(repr(_content(manifest)).encode())


def _content(manifest: Manifest) -> object:
    return manifest.tensors, manifest.skeleton


def prove_index(manifest: Manifest, table: ChunkTable, tensors: Collection[int]) -> None:
    """Prove that chunks cover tensors exactly once, and that their fingerprints add up to the manifest's."""
    check_chunks(manifest.tensors, table, tensors)
    sums = table.fingerprint_sums()
    for number in sorted(tensors):
        tensor = manifest.tensors[number]
        if sums.get(number, 0) != tensor.fingerprint:
            raise Corrupt(f"the chunks of tensor {tensor.name!r} do not add up to its fingerprint")
