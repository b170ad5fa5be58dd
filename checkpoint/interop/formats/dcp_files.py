"""What lies in the files of a torch distributed checkpoint: chunks of tensors, and objects."""

from itertools import pairwise
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.archive import Archive, Stored, read_part, read_window
from checkpoint.interop.formats.dcp_metadata import Directory, Item
from checkpoint.interop.formats.extents import Extent
from checkpoint.interop.formats.safetensors import Header, read_header
from checkpoint.interop.formats.tiles import Tile
from checkpoint.interop.formats.windows import Window
from checkpoint.interop.place import Place

_ZIP = b"PK\x03\x04"
_NEAR_BYTES = 64 << 10  # objects that are no farther apart are read in one go,
_MAX_GO_BYTES = 32 << 20  # up to this size
_MAX_COMPARED = 256  # files whose ends are compared: each takes a request
_END_BYTES = 4 << 10


class Leaf:
    """A tensor of the state."""

    __slots__ = ("dtype", "shape", "tiles")

    def __init__(self, dtype: str, shape: tuple[int, ...], tiles: list[Tile]) -> None:
        self.dtype, self.shape, self.tiles = dtype, shape, tiles


class Files:
    """The files of the ranks: each chunk and each object is a file of torch.save within one of them."""

    def __init__(self, place: Place, directory: Directory) -> None:
        self._place, self._directory = place, directory
        self._headers: dict[str, Header] = {}
        self._check_overlaps()
        _check_copies(place, directory)

    def tile(self, name: str, box: Box, item: Item, dtype: str) -> Tile:
        """Return a chunk of a tensor, which is looked for when it is read."""
        known: list[Extent] = []

        def locate() -> Extent:
            if not known:
                extent = self._chunk(name, item)
                if (extent.shape, extent.dtype) != (box.size, dtype):
                    raise Corrupt(
                        f"{item.path} in {self._place} holds {extent.dtype} {extent.shape} at {item.offset}, "
                        f"where {dtype} {box.size} of {name!r} should be: is the file another rank's?"
                    )
                known.append(extent)
            return known[0]

        return Tile(box, locate)

    def objects(self) -> dict[str, Any]:
        """Return everything that is no tensor, read in few requests."""
        order = sorted(self._directory.objects.items(), key=lambda entry: (entry[1].path, entry[1].offset))
        found: dict[str, Any] = {}
        base, data = Item("", 0, 0), b""
        for number, (name, item) in enumerate(order):
            if item.path != base.path or item.stop > base.stop:
                base = self._go(item, [other for _, other in order[number + 1 :]])
                data = self._place.read(base.path, base.offset, base.num_bytes)
            part = data[item.offset - base.offset : item.stop - base.offset]
            archive = read_window(Window.of(self._place, item.path, item.offset, part))
            found[name] = _with_leaves(archive.tree, archive)
        return found

    def _go(self, first: Item, others: list[Item]) -> Item:
        """Return the range that holds an object and as many of those after it as lie near."""
        stop = first.stop
        for other in others:
            is_near = other.path == first.path and other.offset <= stop + _NEAR_BYTES
            if not is_near or other.stop - first.offset > _MAX_GO_BYTES:
                break
            stop = max(stop, other.stop)
        return Item(first.path, first.offset, stop - first.offset)

    def _chunk(self, name: str, item: Item) -> Extent:
        if self._is_safetensors(item):
            header = self._headers.setdefault(item.path, read_header(self._place, item.path))
            if name not in header.tensors:
                raise Corrupt(f"{item.path} in {self._place} lacks {name!r}")
            return header.tensors[name]
        archive = read_part(self._place, item.path, (item.offset, item.stop))
        if not isinstance(archive.tree, Stored):
            raise Corrupt(f"{item.path} in {self._place} holds no tensor at {item.offset}, where {name!r} is")
        return archive.locate(archive.tree)

    def _is_safetensors(self, item: Item) -> bool:
        """Tell whether the file is one of safetensors: its items then have no bytes of their own."""
        if item.path in self._headers:
            return True
        head = self._place.read(item.path, 0, min(9, self._place.files[item.path]))
        return head[:4] != _ZIP and head[8:9] == b"{"

    def _check_overlaps(self) -> None:
        items = [item for one in self._directory.tensors.values() for item in one.chunks.values()]
        items += self._directory.objects.values()
        for one, other in pairwise(sorted(items, key=lambda item: (item.path, item.offset))):
            if one.path == other.path and other.offset < one.stop and not self._is_safetensors(one):
                raise Corrupt(
                    f"two things lie on top of each other in {one.path} of {self._place}: {one.num_bytes} "
                    f"bytes at {one.offset}, and {other.num_bytes} at {other.offset}"
                )


def _check_copies(place: Place, directory: Directory) -> None:
    """See that no two files of ranks are the same: one would be a copy in the place of the other.

    That shards are equal is no error where each is one value all over, as optimizer states are at first.
    Zips end with checksums of what they hold, so the ends of files tell most of them apart.
    """
    by_size: dict[int, dict[bytes, str]] = {}
    items: dict[str, Item] = {}
    for one in directory.tensors.values():
        for item in one.chunks.values():
            items.setdefault(item.path, item)
    for path in items if len(items) <= _MAX_COMPARED else ():
        size = place.files[path]
        end = place.read(path, max(0, size - _END_BYTES))
        known = by_size.setdefault(size, {}).setdefault(end, path)
        if known != path and _is_same(place, known, path) and not _is_constant(place, items[path]):
            raise Corrupt(
                f"{known} and {path} in {place} are the same, and belong to different ranks: is one of them "
                "a copy that was put in the place of the other?"
            )


def _is_same(place: Place, one: str, other: str) -> bool:
    size = place.files[one]
    starts = range(0, size, _MAX_GO_BYTES)
    return all(
        place.read(one, start, min(_MAX_GO_BYTES, size - start))
        == place.read(other, start, min(_MAX_GO_BYTES, size - start))
        for start in starts
    )


def _is_constant(place: Place, item: Item) -> bool:
    """Tell whether the first chunk of a file is one value all over, as far as its first megabytes tell."""
    archive = read_part(place, item.path, (item.offset, item.stop))
    if not isinstance(archive.tree, Stored):
        return False
    extent = archive.locate(archive.tree)
    bits = place.read(extent.path, extent.offset, min(extent.num_bytes, _MAX_GO_BYTES))
    width = itemsize(extent.dtype)
    return bits == bits[:width] * (len(bits) // width)


def _with_leaves(value: Any, archive: Archive) -> Any:
    """Return an object in which tensors are leaves."""
    match value:
        case Stored():
            return Leaf(
                value.dtype, value.shape, [Tile(Box.whole(value.shape), lambda: archive.locate(value))]
            )
        case dict():
            return {key: _with_leaves(item, archive) for key, item in value.items()}
        case list():
            return [_with_leaves(item, archive) for item in value]
        case tuple():
            return tuple(_with_leaves(item, archive) for item in value)
    return value
