"""Erasure codes: m parities of k pieces, and what was lost rebuilt from any k of the k + m. Pure."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pyeclib.ec_iface import VALID_EC_TYPES, ECDriver

from checkpoint.errors import CheckpointError, Unrecoverable
from checkpoint.redundancy.scratch import scratch
from checkpoint.store.contract import Buffer

_STEP_BYTES = 256 << 10  # what is summed up at a time: the sum stays in the cache
# Every k of k + m rows can be solved for in these (in isa_l_rs_vand not always, from four parities on).
_REED_SOLOMON = ("isa_l_rs_cauchy", "liberasurecode_rs_vand")
_HEADER_BYTES = 80  # which the library puts before each of its fragments
_WORD_BYTES = 16
_Bytes = npt.NDArray[np.uint8]


class Code(Protocol):
    """Rows are numbered: the k pieces from 0, then the m parities. Pieces may differ in length.

    A shorter piece counts as if zeros followed. A parity is as long as the longest piece, or a little longer.
    """

    def encode(self, pieces: Sequence[Buffer]) -> list[Buffer]:
        """Return the m parities of k pieces."""

    def rebuild(self, present: Mapping[int, Buffer], lost: Mapping[int, int]) -> dict[int, Buffer]:
        """Return the lost pieces by row, given their lengths, from any k rows. Raises Unrecoverable."""


class Xor:
    """One parity: the exclusive or of all pieces."""

    def __init__(self, num_data: int) -> None:
        self._num_data = num_data

    def encode(self, pieces: Sequence[Buffer]) -> list[Buffer]:
        """Return the one parity."""
        return [_xor(pieces, max(memoryview(piece).nbytes for piece in pieces))]

    def rebuild(self, present: Mapping[int, Buffer], lost: Mapping[int, int]) -> dict[int, Buffer]:
        """Return the lost piece."""
        _check_enough(len(present), self._num_data)
        used = list(present.values())[: self._num_data]
        return {row: _xor(used, num_bytes) for row, num_bytes in lost.items()}


class ReedSolomon:
    """As many parities as wanted, by liberasurecode (with ISA-L where it was built with it)."""

    def __init__(self, num_data: int, num_parity: int) -> None:
        self._num_data = num_data
        self._driver = ECDriver(k=num_data, m=num_parity, ec_type=_backend())
        self._headers: tuple[int, list[bytes]] = 0, []

    def encode(self, pieces: Sequence[Buffer]) -> list[Buffer]:
        """Return the parities."""
        width = _width(pieces)
        fragments = self._driver.encode(b"".join(part for piece in pieces for part in _padded(piece, width)))
        return [memoryview(fragment)[_HEADER_BYTES:] for fragment in fragments[self._num_data :]]

    def rebuild(self, present: Mapping[int, Buffer], lost: Mapping[int, int]) -> dict[int, Buffer]:
        """Return the lost rows."""
        _check_enough(len(present), self._num_data)
        if not lost:
            return {}
        # One of k rows, when a data row is lost, is a parity, and so of full width.
        used = dict(list(present.items())[: self._num_data])
        width = _width(list(used.values()))
        headers = self._headers_of(width)
        fragments = [b"".join((headers[row], *_padded(piece, width))) for row, piece in used.items()]
        found = self._driver.reconstruct(fragments, list(lost))
        return {
            row: memoryview(fragment)[_HEADER_BYTES:][:num_bytes]
            for (row, num_bytes), fragment in zip(lost.items(), found, strict=True)
        }

    def _headers_of(self, width: int) -> list[bytes]:
        """Return what the library puts before rows of this width: it tells the row, nothing of its bytes."""
        if self._headers[0] != width:
            blank = self._driver.encode(bytes(self._num_data * width))
            self._headers = width, [fragment[:_HEADER_BYTES] for fragment in blank]
        return self._headers[1]


def code_of(num_data: int, num_parity: int) -> Code:
    """Return the cheapest code for so many rows: exclusive or for one parity, Reed-Solomon for more."""
    return Xor(num_data) if num_parity == 1 else ReedSolomon(num_data, num_parity)


def xor_into(total: memoryview, piece: memoryview) -> None:
    """Make the total the exclusive or of itself and a piece of its length."""
    whole = np.frombuffer(total, np.uint8)
    np.bitwise_xor(whole, np.frombuffer(piece, np.uint8), out=whole)


def _check_enough(num_present: int, num_data: int) -> None:
    """Raise Unrecoverable if there are fewer rows than were encoded."""
    if num_present < num_data:
        raise Unrecoverable(
            f"{num_present} rows are left and {num_data} are needed: more was lost than the parity makes up "
            "for; restore from a farther tier"
        )


def _xor(pieces: Sequence[Buffer], num_bytes: int) -> Buffer:
    """Return the exclusive or of the pieces, cut or filled up to a length."""
    views = [np.frombuffer(piece, np.uint8)[:num_bytes] for piece in pieces]
    longest, *others = sorted(views, key=len, reverse=True)
    total = scratch(num_bytes)
    total[len(longest) :] = 0
    for start in range(0, len(longest), _STEP_BYTES):
        stop = start + _STEP_BYTES
        _add(total[start:stop], longest[start:stop], [other[start:stop] for other in others])
    return total.data


def _add(total: _Bytes, first: _Bytes, others: Sequence[_Bytes]) -> None:
    """Write the exclusive or of the first, which is the longest, and the others."""
    if others and len(others[0]) == len(first):
        np.bitwise_xor(first, others[0], out=total[: len(first)])
        others = others[1:]
    else:
        total[: len(first)] = first
    for other in others:
        part = total[: len(other)]
        np.bitwise_xor(part, other, out=part)


def _width(pieces: Sequence[Buffer]) -> int:
    """Return a width that holds every piece and that every backend takes as it is."""
    longest = max(memoryview(piece).nbytes for piece in pieces)
    return max(1, -(-longest // _WORD_BYTES)) * _WORD_BYTES


def _padded(piece: Buffer, width: int) -> tuple[Buffer, bytes]:
    return piece, bytes(width - memoryview(piece).nbytes)


@cache
def _backend() -> str:
    """Return the best Reed-Solomon that the installed library offers."""
    for name in _REED_SOLOMON:
        if name in VALID_EC_TYPES:
            return name
    raise CheckpointError(
        f"pyeclib offers none of {', '.join(_REED_SOLOMON)} here: install its wheel, or use one parity"
    )
