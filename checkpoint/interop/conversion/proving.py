"""Fingerprints of the global tensors that foreign ones hold, by the reference's account: what a conversion is
held against. Nothing is put together for it, and no plan has a part in it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from checkpoint.engine.pipeline import fan_out
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import Mismatch
from checkpoint.format.box import Box, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.format.fingerprint import MODULUS, fingerprint
from checkpoint.interop.account import Account, Share
from checkpoint.interop.conversion.casting import Reach, are_numbers, parts_of, reference_cast
from checkpoint.interop.conversion.contract import Array, ConversionSettings
from checkpoint.interop.formats.contract import Contents

_BAND_BYTES = 8 << 20


def prove(
    account: Account, foreign: Contents, settings: ConversionSettings, reach: Reach | None = None
) -> dict[str, int]:
    """Return the fingerprints of all tensors of an account, each share of which is read once.

    Values that rules cast or average are changed by the reference's code; `reach` counts what is lost by it,
    and nothing twice that is there twice. Raises Mismatch if copies differ.
    """
    works, seen, unseen = _works(account), reach or Reach(), Reach()
    firsts = _firsts(works)
    marks = fan_out(
        lambda work: _mark(account, foreign, work, seen if id(work) in firsts else unseen),
        works,
        settings.num_workers,
    )
    return _summed(account, foreign, zip(works, marks, strict=True))


def changed(account: Account, foreign: Contents) -> set[str]:
    """Return the names of the tensors whose values rules cast or average."""
    return {
        one.name
        for one in account.shares
        if one.is_mean or foreign.tensors[one.source].dtype != account.tensors[one.name].dtype
    }


def held_twice(account: Account) -> set[str]:
    """Return the names of the tensors of which something is there more than once."""
    seen: set[tuple[str, Box]] = set()
    found = set()
    for share in account.shares:
        place = share.name, share.place(share.box)
        if share.copy or place in seen:
            found.add(share.name)
        seen.add(place)
    return found


def check_described(account: Account, specs: Iterable[TensorSpec]) -> None:
    """See that tensors are those of an account, of type and shape. Raises Mismatch naming one that is not."""
    found = {spec.name: spec for spec in specs}
    for name in sorted(found.keys() | account.tensors.keys()):
        if found.get(name) != account.tensors.get(name):
            raise Mismatch(
                f"{name!r} became {found.get(name)}, and by the words of the rules it is "
                f"{account.tensors.get(name)}; nothing was committed"
            )


def marked(share: Share, bits: Array, part: Box, spec: TensorSpec) -> int:
    """Return what the bits of a part of a share's box add to its tensor's fingerprint."""
    place = share.place(part)
    turned = np.ascontiguousarray(bits.transpose(share.order))
    return fingerprint(turned, spec.dtype, spec.shape, place)


def shared_bytes(account: Account, foreign: Contents) -> int:
    """Return how many bytes a proof reads: every share once."""
    sizes = (one.box.numel * itemsize(foreign.tensors[one.source].dtype) for one in account.shares)
    return sum(sizes)


def _works(account: Account) -> list[list[Share]]:
    """Return which shares are read together: those of one average, as its ranks are listed; others alone."""
    averages: dict[tuple[str, Box, str], list[Share]] = {}
    for one in account.shares:
        if one.is_mean:
            averages.setdefault((one.name, one.place(one.box), one.copy), []).append(one)
    in_order = [sorted(work, key=lambda one: one.source) for work in averages.values()]
    return [[one] for one in account.shares if not one.is_mean] + in_order


def _firsts(works: Iterable[Sequence[Share]]) -> set[int]:
    """Return which works, by identity, are the tensors' own and no copies of others."""
    found: dict[tuple[str, Box], int] = {}
    for work in works:
        if not work[0].copy:
            found.setdefault((work[0].name, work[0].place(work[0].box)), id(work))
    return set(found.values())


def _mark(account: Account, foreign: Contents, work: Sequence[Share], reach: Reach) -> int:
    """Return what shares of one place add to their tensor's fingerprint, read band by band."""
    one, spec = work[0], account.tensors[work[0].name]
    old = foreign.tensors[one.source].dtype
    is_changed = len(work) > 1 or old != spec.dtype
    bands = parts_of(one.box) if is_changed else split_box(one.box, itemsize(old), _BAND_BYTES)
    return sum(marked(one, _made(foreign, work, band, spec, reach), band, spec) for band in bands) % MODULUS


def _made(foreign: Contents, work: Sequence[Share], band: Box, spec: TensorSpec, reach: Reach) -> Array:
    """Return the bits of a band of the first share, cast or averaged as the rules say."""
    bits, old = foreign.read(work[0].source, band), foreign.tensors[work[0].source].dtype
    if len(work) == 1 and old == spec.dtype:
        return bits
    were_numbers = are_numbers(bits, old)
    if len(work) > 1:  # in doubles, one rank after the other, and divided at the end
        total = reference_cast(bits, old, "float64").view("f8")
        for one in work[1:]:
            bits = foreign.read(one.source, band.moved(work[0].box.start, one.box.start))
            were_numbers &= are_numbers(bits, foreign.tensors[one.source].dtype)
            summand = reference_cast(bits, foreign.tensors[one.source].dtype, "float64")
            with np.errstate(over="ignore", invalid="ignore"):
                total = total + summand.view("f8")
        bits, old = np.asarray(total / len(work)).view("<u8"), "float64"
    made = reference_cast(bits, old, spec.dtype)
    reach.see(spec.name, were_numbers, made, spec.dtype)
    return made


_Marked = tuple[int, Share]


def _summed(
    account: Account, foreign: Contents, marks: Iterable[tuple[Sequence[Share], int]]
) -> dict[str, int]:
    """Add up what shares come to, having seen that whatever is there several times is the same."""
    groups: dict[tuple[str, str], dict[Box, _Marked]] = {}
    for (one, *_), mark in marks:
        there = groups.setdefault((one.name, one.copy), {})
        _check_same(foreign, there.setdefault(one.place(one.box), (mark, one)), (mark, one))
    sums = {name: _sum(groups.get((name, ""), {})) for name in account.tensors}
    for (name, copy), there in groups.items():
        own = groups.get((name, ""), {})
        for place in there.keys() & own.keys() if copy else ():
            _check_same(foreign, own[place], there[place])
        if not there.keys() <= own.keys() and _sum(there) != sums[name]:  # cut in another way
            raise Mismatch(f"{name!r}: its second copy, {copy}, differs")
    return sums


def _sum(marks: Mapping[Box, _Marked]) -> int:
    return sum(mark for mark, _ in marks.values()) % MODULUS


def _check_same(foreign: Contents, known: _Marked, other: _Marked) -> None:
    if known[0] != other[0]:
        one, two = (foreign.tensors[share.source] for _, share in (known, other))
        raise Mismatch(f"{known[1].name!r}: the copies in {one} and {two} differ")
