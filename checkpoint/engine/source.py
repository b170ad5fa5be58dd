"""Where checkpoints can be read from: a store, or the memory of the host that took them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.held import Held
from checkpoint.errors import Corrupt, NoCheckpoint, NotFound
from checkpoint.format.codec import Buffer
from checkpoint.format.manifest import Manifest, chunks_of_page, pages_with
from checkpoint.format.table import ChunkTable
from checkpoint.store.contract import ByteRange, Store, check_ranges

_PIECE_BYTES = 2 << 20


@runtime_checkable
class Source(Protocol):
    """A place that has checkpoints. What it returns is believed only after it was proved."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def steps(self) -> list[int]:
        """List the steps it has, oldest first."""

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of a step. Raises NoCheckpoint, Corrupt, Unsupported."""

    def chunks(self, manifest: Manifest, tensors: Collection[int] | None = None) -> ChunkTable:
        """Read the index of one of its manifests: of some tensors, by their places there, or of all.

        Raises Corrupt naming the page that is not what the manifest says.
        """

    def read(self, manifest: Manifest, pack: int, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Return ranges of a manifest's pack, by its place there. Raises Corrupt if they are not there."""


@runtime_checkable
class ReadsInto(Protocol):
    """A store that can read into the caller's memory, which saves a copy."""

    def read_into(self, key: str, offset: int, pieces: Iterable[memoryview]) -> None:
        """Fill pieces of memory, one by one, with the bytes of a value from an offset on.

        The next piece is asked for when the one before is filled. Raises NotFound if there are too few bytes.
        """


@runtime_checkable
class HasFiles(Protocol):
    """A store whose values are files of this machine."""

    def descriptor(self, key: str) -> AbstractContextManager[int]:
        """Hold a value open. Raises NotFound."""


@runtime_checkable
class FileSource(Source, Protocol):
    """A source whose packs may be files of this machine."""

    @property
    def has_files(self) -> bool:
        """Whether they are."""

    def file(self, manifest: Manifest, pack: int) -> AbstractContextManager[int]:
        """Hold a pack open as a file. Raises Corrupt if it is missing."""


@runtime_checkable
class DirectSource(Protocol):
    """A source that reads into the caller's memory: what comes may be less sure than what `read` returns."""

    @property
    def piece_bytes(self) -> int:
        """How much it is best asked for at a time."""

    def can_read_into(self, pack: int) -> bool:
        """Whether that saves anything with this pack."""

    def read_into(self, manifest: Manifest, pack: int, offset: int, pieces: Iterable[memoryview]) -> None:
        """Fill pieces of memory with what lies from an offset of a pack on. Raises Corrupt if it is not."""


@runtime_checkable
class ManyPlaces(Protocol):
    """A source whose packs lie in different places."""

    def origin(self, pack: int) -> str:
        """What reports call the place of a pack."""


def origins_of(source: Source) -> Callable[[int], str]:
    """Return what tells, by a pack of a source, what reports call the place that it was read from."""
    return source.origin if isinstance(source, ManyPlaces) else lambda _: source.name


class StoreSource:
    """The checkpoints in a store."""

    def __init__(self, store: Store, name: str = "store") -> None:
        self._store = store
        self._direct = store if isinstance(store, ReadsInto) else None
        self._files = store if isinstance(store, HasFiles) else None
        self._name = name
        self._manifests: dict[int, Manifest] = {}

    @property
    def name(self) -> str:
        """What reports call it."""
        return self._name

    def steps(self) -> list[int]:
        """List the steps that have a manifest."""
        return Catalog(self._store).steps()

    def manifest(self, step: int) -> Manifest:
        """Read a step's manifest, once: none ever changes."""
        if step not in self._manifests:
            self._manifests[step] = Catalog(self._store).manifest(step)
        return self._manifests[step]

    def chunks(self, manifest: Manifest, tensors: Collection[int] | None = None) -> ChunkTable:
        """Read the pages that are needed, one at a time."""
        pages = manifest.pages if tensors is None else pages_with(manifest, tensors)
        tables = []
        for page in pages:
            try:
                table = chunks_of_page(manifest, page, self._store.read(page.key)[0])
            except NotFound as error:
                raise Corrupt(
                    f"the checkpoint of step {manifest.step} in {self._store} lacks its page {page.key}"
                ) from error
            tables.append(table if tensors is None else table.of_tensors(tensors))
        return ChunkTable.concat(tables)

    def read(self, manifest: Manifest, pack: int, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Read ranges of a pack."""
        key = manifest.packs[pack].key
        try:
            found = self._store.read(key, ranges)
        except NotFound as error:
            raise Corrupt(f"{key} is missing or too short: {error}") from error
        return checked(found, ranges, key)

    @property
    def has_files(self) -> bool:
        """Whether packs are files of this machine."""
        return self._files is not None

    @contextmanager
    def file(self, manifest: Manifest, pack: int) -> Iterator[int]:
        """Hold a pack open as a file. Raises Corrupt if it is missing."""
        key = manifest.packs[pack].key
        if self._files is None:
            raise TypeError(f"{self._store} has no files")
        try:
            with self._files.descriptor(key) as descriptor:
                yield descriptor
        except NotFound as error:
            raise Corrupt(f"{key} is missing: {error}") from error

    @property
    def piece_bytes(self) -> int:
        """As much as stays in a processor's cache until it is proved, and keeps a thread busy for a while."""
        return _PIECE_BYTES

    def can_read_into(self, pack: int) -> bool:  # noqa: ARG002 -- all packs of a store are alike
        """Whether the store fills memory without a copy."""
        return self._direct is not None

    def read_into(self, manifest: Manifest, pack: int, offset: int, pieces: Iterable[memoryview]) -> None:
        """Fill pieces of memory with what lies from an offset of a pack on. Raises Corrupt if it is not."""
        key = manifest.packs[pack].key
        if self._direct is None:
            raise TypeError(f"{self._store} reads into nobody's memory")
        try:
            self._direct.read_into(key, offset, pieces)
        except NotFound as error:
            raise Corrupt(f"{key} is missing or too short: {error}") from error


class HeldSource:
    """The one snapshot that a host holds; good for as long as it is pinned."""

    def __init__(self, held: Held, name: str = "memory") -> None:
        self._held = held
        self._table = ChunkTable.of(held.chunks)
        self._name = name

    @property
    def name(self) -> str:
        """What reports call it."""
        return self._name

    def steps(self) -> list[int]:
        """Return the one step that is held."""
        return [self._held.manifest.step]

    def manifest(self, step: int) -> Manifest:
        """Return what is held, if it is of this step."""
        if step != self._held.manifest.step:
            raise NoCheckpoint(
                f"memory holds the snapshot of step {self._held.manifest.step}, not of step {step}"
            )
        return self._held.manifest

    def chunks(self, manifest: Manifest, tensors: Collection[int] | None = None) -> ChunkTable:
        """Return the chunks that are held."""
        self.manifest(manifest.step)
        return self._table if tensors is None else self._table.of_tensors(tensors)

    def read(self, manifest: Manifest, pack: int, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """Return ranges of the memory itself, without a copy: it is as one pack."""
        where = f"pack {pack} of the held snapshot of step {self.manifest(manifest.step).step}"
        try:
            check_ranges(where, ranges, self._held.memory.nbytes)
        except NotFound as error:
            raise Corrupt(f"what memory holds is not all there: {error}") from error
        return [self._held.memory[wanted.offset : wanted.stop] for wanted in ranges]


def sources_of(given: Store | Source | Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources that were given, the nearest first; a bare store is one."""
    match given:
        case Sequence():
            return tuple(given)
        case Source():
            return (given,)
        case _:
            return (StoreSource(given),)


def checked(found: Sequence[Buffer], ranges: Sequence[ByteRange], key: str) -> list[Buffer]:
    """Return what was read, if it is as long as was asked for: not every store keeps that promise."""
    if len(found) != len(ranges):
        raise Corrupt(f"{len(found)} instead of {len(ranges)} ranges of {key} were read: ask again")
    for data, wanted in zip(found, ranges, strict=True):
        if memoryview(data).nbytes != wanted.num_bytes:
            raise Corrupt(
                f"{memoryview(data).nbytes} instead of {wanted.num_bytes} bytes at {wanted.offset} "
                f"of {key} were read: the read was cut short"
            )
    return list(found)
