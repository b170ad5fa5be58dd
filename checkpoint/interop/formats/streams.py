"""Writing tensors as streams: block by block, so that no more is held than the budget allows."""

import math
from collections.abc import Iterator, Sequence

from checkpoint.errors import Unsupported
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.moves import Foreign

_MAX_BLOCK_BYTES = 64 << 20
_MIN_BLOCK_BYTES = 64 << 10
_SHARE_OF_BUDGET = 4  # a block, what its reader puts it together from, and what the file's client holds


def blocks_of(
    contents: Contents, number: int, budget_bytes: int, box: Box | None = None
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, or of a box of it, row by row."""
    tensor = contents.tensors[number]
    box = Box.whole(tensor.shape) if box is None else box
    for part in split_box(box, itemsize(tensor.dtype), block_bytes(budget_bytes)):
        yield memoryview(contents.read(number, part).reshape(-1).view("u1").data)


def block_bytes(budget_bytes: int) -> int:
    """Return how large a block may be, so that those that are held together keep to the budget."""
    return max(_MIN_BLOCK_BYTES, min(_MAX_BLOCK_BYTES, budget_bytes // _SHARE_OF_BUDGET))


def num_bytes_of(tensor: Foreign) -> int:
    """Return how many bytes a tensor's elements take up."""
    return math.prod(tensor.shape) * itemsize(tensor.dtype)


def check_global(tensors: Sequence[Foreign], format_name: str) -> None:
    """See that no two tensors have one name, as those of several ranks would. Raises Unsupported."""
    seen: dict[str, Foreign] = {}
    for tensor in tensors:
        if tensor.name in seen:
            raise Unsupported(
                f"the format {format_name} holds global tensors: it cannot hold both {seen[tensor.name]} "
                f"and {tensor}"
            )
        seen[tensor.name] = tensor
