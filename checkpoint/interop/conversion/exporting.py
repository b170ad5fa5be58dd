"""Exporting: a checkpoint is written in another framework's format, and proved by reading it back."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.account import Account
from checkpoint.interop.conversion.casting import (
    Reach,
    reference_fingerprint,
)
from checkpoint.interop.conversion.contract import (
    Array,
    ConversionReport,
    ConversionSettings,
    Listener,
    Progress,
    Proof,
    unheard,
)
from checkpoint.interop.conversion.emigrating import Outward
from checkpoint.interop.conversion.leftovers import left_out
from checkpoint.interop.conversion.marking import Counted
from checkpoint.interop.conversion.measuring import high_water_bytes
from checkpoint.interop.conversion.outbound import Staged
from checkpoint.interop.conversion.padding import check_blank
from checkpoint.interop.conversion.proving import check_described, prove
from checkpoint.interop.conversion.resharding import ONE_RANK, num_bytes_of
from checkpoint.interop.formats.contract import Contents as ForeignContents
from checkpoint.interop.moves import Foreign


def export_checkpoint(
    outward: Outward,
    url: str,
    write: Callable[[ForeignContents], None],
    reopen: Callable[[], ForeignContents],
    *,
    settings: ConversionSettings | None = None,
    listener: Listener = unheard,
) -> ConversionReport:
    """Write an export with `write`, and prove what `reopen` then finds, tensor by tensor.

    Raises Mismatch naming the tensors that do not come back as they were; Corrupt if the source was damaged.
    """
    settings = settings or ConversionSettings()
    began_s, before = time.monotonic(), high_water_bytes()
    watched = Watched(Staged(outward.outbound, settings), outward.written_bytes, listener)
    write(watched)
    listener(Progress("proving", watched.num_done_bytes, watched.num_bytes))
    reach = Reach()
    known = outward.source.fingerprints(outward.names, settings, reach)
    back = Counted(reopen())
    proofs = _prove(outward, known, back, reach, url=url, settings=settings)
    outward.source.settle()
    left = left_out(outward.outbound, back, outward.emigration.format)
    notes = (*outward.notes, *reach.settle(settings.overflow), *outward.source.padding(settings), *left)
    return ConversionReport(
        source=outward.source.url,
        target=url,
        step=outward.source.step,
        layout=", ".join(f"{axis}={ranks}" for axis, ranks in outward.outbound.about.axes.items())
        or ONE_RANK,
        num_tensors=len(outward.contents.tensors),
        num_chunks=len(outward.plan.foreign),
        num_bytes=sum(num_bytes_of(spec) for spec in outward.contents.tensors),
        read_bytes=outward.source.num_read_bytes() + back.num_bytes,
        written_bytes=watched.num_bytes,
        peak_bytes=outward.most_held_bytes(settings),
        grown_bytes=high_water_bytes() - before,
        seconds=time.monotonic() - began_s,
        proofs=proofs,
        notes=notes,
    )


class Watched:
    """What a writer reads, counted."""

    def __init__(self, inner: ForeignContents, num_bytes: int, listener: Listener) -> None:
        self.about = inner.about
        self.tensors: Sequence[Foreign] = inner.tensors
        self.num_bytes = num_bytes
        self.num_done_bytes = 0
        self._lock = threading.Lock()
        self._inner = inner
        self._listener = listener

    def read(self, number: int, box: Box) -> Array:
        """Return the bits of a box, and tell that they were asked for."""
        found = self._inner.read(number, box)
        with self._lock:
            self.num_done_bytes += found.nbytes
            self._listener(Progress("writing", self.num_done_bytes, self.num_bytes))
        return found


def _prove(
    outward: Outward,
    known: Mapping[str, int],
    back: ForeignContents,
    reach: Reach,
    *,
    url: str,
    settings: ConversionSettings,
) -> tuple[Proof, ...]:
    """Work out every global tensor's fingerprint from what was written, and hold it against the source's."""
    account = _described(outward, back, url)
    check_blank(account, back, settings)
    found = prove(account, back, settings)
    proofs, wrong = [], []
    uncast = outward.uncast
    for number, new in enumerate(outward.contents.tensors):
        is_cast = new.name not in uncast
        wanted = known[new.name]
        if is_cast:
            wanted = reference_fingerprint(outward.chosen, number, new=new.dtype, known=wanted, reach=reach)
        is_changed = is_cast or new.name in outward.source.changed
        proofs.append(Proof(new.name, "reference" if is_changed else "fingerprint", wanted))
        if found.get(new.name) != wanted:
            wrong.append(new.name)
    if wrong:
        raise Mismatch(
            f"what was written to become {url} is not left there: {len(wrong)} of its {len(proofs)} tensors "
            f"differ from the source's: {wrong[:5]}"
        )
    return tuple(proofs)


def _described(outward: Outward, back: ForeignContents, url: str) -> Account:
    """Return the account of what was written: all that should be there, in type and shape, and no more."""
    try:
        own = outward.own(back)
        outward.check_whole(own)
        account = outward.account(own)
        check_described(account, outward.contents.tensors)
    except Mismatch as error:
        raise Mismatch(f"what was written to become {url} is not left there: {error}") from error
    return account
