"""Writing tensors as streams: block by block, so that no more is held than the budget allows."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing

from checkpoint.engine.pipeline import Crew
from checkpoint.errors import Unsupported
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.draft import NUM_THREADS
from checkpoint.interop.formats.contract import Array, Contents
from checkpoint.interop.moves import Foreign

# The allocator hands out blocks of this size again; larger ones are fresh memory each time, whose first touch
# costs more than reading into them.
_MAX_BLOCK_BYTES = 8 << 20
_MIN_BLOCK_BYTES = 64 << 10
# Of each thread: it has a block, and what its reader puts it together from; one waits, and one is written.
_SHARE_OF_BUDGET = 4


def blocks_of(
    contents: Contents, number: int, budget_bytes: int, box: Box | None = None
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, or of a box of it, row by row."""
    tensor = contents.tensors[number]
    box = Box.whole(tensor.shape) if box is None else box
    for part in split_box(box, itemsize(tensor.dtype), block_bytes(budget_bytes)):
        yield _bytes_of(contents.read(number, part))


def blocks_ahead(
    contents: Contents, numbers: Iterable[int], budget_bytes: int, num_threads: int
) -> Iterator[memoryview]:
    """Yield the bytes of tensors, one after the other; some threads read what comes next."""
    parts = (
        (number, part)
        for number in numbers
        for part in split_box(
            Box.whole(contents.tensors[number].shape),
            itemsize(contents.tensors[number].dtype),
            block_bytes(budget_bytes, num_threads),
        )
    )
    coming: deque[Future[Array]] = deque()
    with closing(Crew("ahead", num_threads)) as crew:
        for number, part in parts:
            coming.append(crew.submit(contents.read, number, part))
            if len(coming) > num_threads:
                yield _bytes_of(coming.popleft().result())
        while coming:
            yield _bytes_of(coming.popleft().result())


def _bytes_of(bits: Array) -> memoryview:
    return memoryview(bits.reshape(-1).view("u1").data)


def block_bytes(budget_bytes: int, num_threads: int = NUM_THREADS) -> int:
    """Return how large a block may be, so that those that are held together keep to the budget."""
    return max(_MIN_BLOCK_BYTES, min(_MAX_BLOCK_BYTES, budget_bytes // (_SHARE_OF_BUDGET * num_threads)))


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
