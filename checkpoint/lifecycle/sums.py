"""The sums of blocks behind raw chunks: where they lie, and whether they are as they were written.

What lies behind a chunk, the pack's own index tells: sums, zeros up to the next multiple of 64, or, as older
writers left it, the next chunk or the index at once.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from checkpoint.format.blocks import BLOCK_BYTES, blocks_of, read_sums, total_of
from checkpoint.format.codec import Buffer, Codec
from checkpoint.format.manifest import Manifest
from checkpoint.format.pack import ALIGNMENT
from checkpoint.format.table import NO_BASE, ChunkTable

Starts = NDArray[np.uint64]  # where the chunks of a pack begin and, last, its index


def find_sums(manifest: Manifest, table: ChunkTable, starts: Mapping[str, Starts]) -> NDArray[np.int64]:
    """Return how many bytes of sums lie behind each row's chunk: 0 if there are none, or no room for them.

    Nothing is known of a pack, by its key, of which there are no `starts`.
    """
    rows, owners = table.rows, table.owners()
    found = np.zeros(len(rows), np.int64)
    may_have = (rows["codec"] == Codec.RAW) & (rows["base"] == NO_BASE) & (rows["num_bytes"] > BLOCK_BYTES)
    for row in np.flatnonzero(may_have).tolist():
        pack, tensor = manifest.packs[rows["pack"][row]], manifest.tensors[rows["tensor"][row]]
        blocks = blocks_of(tensor.dtype, tensor.shape, table[int(owners[row])].box)
        behind = starts.get(pack.key)
        if blocks is None or behind is None:
            continue
        end = int(rows["offset"][row]) + int(rows["num_bytes"][row])
        following = behind[np.searchsorted(behind, np.uint64(end)) :][:1].tolist()
        if following and following[0] - end >= blocks.sums_bytes:
            found[row] = blocks.sums_bytes
    return found


def are_sound(sums: Buffer, end: int, fingerprint: int) -> bool:
    """Whether what lies behind a chunk's end adds up to its fingerprint, or is nothing but padding."""
    is_padding = memoryview(sums).nbytes <= -end % ALIGNMENT and not any(sums)
    return is_padding or total_of(read_sums(sums)) == fingerprint
