"""What lies beyond the end of tensors, such as a padded vocabulary: looked at before it is left out."""

import numpy as np

from checkpoint.engine.pipeline import fan_out
from checkpoint.errors import Mismatch
from checkpoint.format.box import split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.interop.account import Account, Padded
from checkpoint.interop.conversion.contract import ConversionSettings
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.numbered import listed

_BAND_BYTES = 8 << 20


def padding_bytes(account: Account, foreign: Contents) -> int:
    """Return how many bytes there are beyond the end of tensors."""
    sizes = (one.box.numel * itemsize(foreign.tensors[one.source].dtype) for one in account.padding)
    return sum(sizes)


def look_at_padding(account: Account, foreign: Contents, settings: ConversionSettings) -> list[str]:
    """Read what lies beyond the end of tensors, on all ranks: tell how much it is, and if anything is in it.

    Frameworks train these rows like the others (Megatron) or leave them zero: neither is an error.
    """
    has_values = fan_out(lambda one: _has_values(foreign, one), account.padding, settings.num_workers)
    rows: dict[str, dict[int, int]] = {}
    filled = set()
    for one, value in zip(account.padding, has_values, strict=True):
        rows.setdefault(one.name, {})[one.first] = one.num_rows
        filled |= {one.name} if value else set()
    kinds: dict[tuple[int, bool], list[str]] = {}
    for name, there in rows.items():
        kinds.setdefault((sum(there.values()), name in filled), []).append(name)
    return [
        f"{number} rows of padding are left out of {listed(names)}: "
        + ("they hold values, as of a framework that trains its padding" if is_filled else "all of it zero")
        for (number, is_filled), names in kinds.items()
    ]


def check_blank(account: Account, written: Contents, settings: ConversionSettings) -> None:
    """See that what was written beyond the end of tensors is zero, as writers make it. Raises Mismatch."""
    has_values = fan_out(lambda one: _has_values(written, one), account.padding, settings.num_workers)
    filled = {one.name for one, value in zip(account.padding, has_values, strict=True) if value}
    if filled:
        raise Mismatch(
            f"the padding that was written of {sorted(filled)[:5]} is not zero: it is not left there"
        )


def _has_values(foreign: Contents, one: Padded) -> bool:
    bands = split_box(one.box, itemsize(foreign.tensors[one.source].dtype), _BAND_BYTES)
    return sum(bool(np.any(foreign.read(one.source, band))) for band in bands) > 0  # all of it is read
