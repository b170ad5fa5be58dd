"""An export rehearsed: all that is done but for the bytes, to tell what it would read and write.

A rehearsal asks for the same boxes in the same order as the export, and gets zeros; what is written
goes nowhere.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from checkpoint.engine.plan import TensorSpec
from checkpoint.format.box import Box
from checkpoint.format.dtypes import dtype_of
from checkpoint.interop.conversion.casting import Reach, bands_of
from checkpoint.interop.conversion.contract import Array, ConversionSettings, Listener, Wish
from checkpoint.interop.conversion.emigrating import Outward
from checkpoint.interop.conversion.exporting import Watched
from checkpoint.interop.conversion.outbound import Staged
from checkpoint.interop.conversion.padding import padding_bytes
from checkpoint.interop.conversion.proving import shared_bytes
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.formats.contract import Contents, ForeignCheckpoint
from checkpoint.interop.moves import Foreign


class BlankStored:
    """A stored checkpoint that counts what would be read of it, and returns zeros."""

    def __init__(self, stored: Stored) -> None:
        self.store, self.manifest = stored.store, stored.manifest
        self.tensors: Sequence[TensorSpec] = stored.tensors
        self.read_bytes = 0
        self._stored = stored
        self._lock = threading.Lock()

    def read(self, wishes: Sequence[Wish]) -> list[Array]:
        """Return zeros for boxes."""
        num_bytes = self._stored.foreseen_bytes(wishes)
        with self._lock:
            self.read_bytes += num_bytes
        return [np.zeros(box.size, dtype_of(self.tensors[number].dtype).carrier) for number, box in wishes]


class BlankForeign:
    """A foreign checkpoint of which nothing is read: its tensors are zeros."""

    def __init__(self, foreign: ForeignCheckpoint) -> None:
        self.about = foreign.about
        self.tensors: Sequence[Foreign] = foreign.tensors

    def read(self, number: int, box: Box) -> Array:
        """Return zeros for a box."""
        return np.zeros(box.size, dtype_of(self.tensors[number].dtype).carrier)

    def settle(self) -> None:
        """Do nothing: nothing was read."""


def rehearse_export(
    outward: Outward,
    write: Callable[[Contents], None],
    *,
    settings: ConversionSettings,
    listener: Listener,
) -> int:
    """Do what an export does, of a blank source, with `write`. Returns how many bytes it would read."""
    write(Watched(Staged(outward.outbound, settings), outward.written_bytes, listener))
    outward.source.fingerprints(outward.names, settings, Reach())
    for number, new in enumerate(outward.contents.tensors):
        if new.name not in outward.uncast:
            for band in bands_of(outward.chosen.tensors[number]):
                outward.chosen.read([(number, band)])
    outward.source.padding(settings)
    account = outward.account(dict(enumerate(outward.plan.foreign)))
    proved = shared_bytes(account, outward.outbound) + padding_bytes(account, outward.outbound)
    return outward.source.num_read_bytes() + proved
