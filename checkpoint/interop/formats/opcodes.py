"""Walks over a pickle without carrying it out: where it ends, and whether it asks for what no data need.

CPython's unpickler believes some numbers that it reads: one opcode of five bytes makes it take gigabytes. So
a pickle that may be hostile is looked through first.
"""

import re
from typing import Final

from checkpoint.errors import Corrupt

# What has a fixed length is skipped in one go: opcodes without an argument, then those with 1, 2, 4, 8 bytes.
_PLAIN: Final = re.compile(
    rb"(?:[()0-2NQRbed}asu\]tlo\x81\x85-\x89\x8f\x90\x91\x92\x93\x94]"
    rb"|[Khq\x80].|M..|[Jj]....|[G\x95].{8})*+",
    re.DOTALL,
)
_STOP, _LONG_PUT = ord("."), ord("r")
# Opcodes whose argument tells its own length, in so many bytes.
_COUNTED: Final = {
    **dict.fromkeys(b"\x8cCU\x8a", 1),  # SHORT_BINUNICODE, SHORT_BINBYTES, SHORT_BINSTRING, LONG1
    **dict.fromkeys(b"XBT\x8b", 4),  # BINUNICODE, BINBYTES, BINSTRING, LONG4
    **dict.fromkeys(b"\x8d\x8e\x96", 8),  # BINUNICODE8, BINBYTES8, BYTEARRAY8
}
_GLOBAL = ord("c")  # two lines; other opcodes with lines are of protocols that no checkpoint is written in
_MAX_LONG_BYTES = 1 << 12


def end_of_pickle(data: bytes, start: int, where: str) -> int | None:
    """Return where the pickle that begins at `start` ends, exclusive; None if it goes on beyond the data.

    Raises Corrupt if it is none, or asks for memory out of all proportion.
    """
    place = start
    while True:
        skipped = _PLAIN.match(data, place)
        place = skipped.end() if skipped else place
        if place >= len(data):
            return None
        code = data[place]
        if code == _STOP:
            return place + 1
        after = _after(data, place, code)
        if after is None:
            raise Corrupt(f"{where} is no pickle of data: there is {data[place : place + 1]!r} at {place}")
        if after > len(data):
            return None
        place = after


def _after(data: bytes, place: int, code: int) -> int | None:
    """Return where the opcode after the one at `place` begins; None if this one may not be there."""
    if code in _COUNTED:
        begin = place + 1 + _COUNTED[code]
        length = int.from_bytes(data[place + 1 : begin], "little")
        if code in b"\x8a\x8b" and length > _MAX_LONG_BYTES:
            return None
        return begin + length
    if code == _LONG_PUT:
        index = int.from_bytes(data[place + 1 : place + 5], "little")
        return place + 5 if index < len(data) or place + 5 > len(data) else None
    if code == _GLOBAL:
        module = data.find(b"\n", place)
        name = data.find(b"\n", module + 1) if module >= 0 else -1
        return name + 1 if name >= 0 else len(data) + 1
    if code in b"Khq\x80MJjG\x95":  # cut off within its argument
        return len(data) + 1
    return None
