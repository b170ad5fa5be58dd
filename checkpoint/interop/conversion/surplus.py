"""What readers find that the source has no tensor for: masters of bare weights, plain numbers, steps."""

from collections.abc import Mapping

import numpy as np

from checkpoint.errors import Mismatch
from checkpoint.format.box import Box
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.tiles import as_bits
from checkpoint.interop.formats.told import told_numbers
from checkpoint.interop.moves import Foreign

HOLD_ROUNDED = ("megatron-dist", "deepspeed", "deepspeed-universal")  # their readers compare with masters
_SAY_STEPS = ("megatron-dist", "deepspeed")  # of whatever has moments, if nothing else the checkpoint's own
_MASTER, _STEP = "optimizer.master.", "optimizer.step."


def own_tensors(outbound: Contents, back: Contents, format: str) -> dict[int, Foreign]:
    """Return what was read back of an export, by number, without what the format's reader adds by itself.

    Masters that are made of bare weights are held against these by readers. Raises Mismatch for a plain
    number of the source that is another one now.
    """
    planned = {one.name for one in outbound.tensors}
    has_steps = any(name.startswith(_STEP) for name in planned)
    weights = {_key(one, f"{_MASTER}{one.name}") for one in back.tensors} if format in HOLD_ROUNDED else set()
    told = told_numbers(outbound.about.extra)
    own = {}
    for number, one in enumerate(back.tensors):
        if one.name in planned:
            own[number] = one
        elif not one.shape and one.name in told:
            _check_told(number, back, told)
        elif not one.shape and one.name.startswith(_STEP) and format in _SAY_STEPS and not has_steps:
            continue
        elif one.dtype != "float32" or _key(one, one.name) not in weights:
            own[number] = one
    return own


def _key(one: Foreign, name: str) -> tuple[object, ...]:
    return name, *one.at.items(), one.shape


def _check_told(number: int, back: Contents, told: Mapping[str, float]) -> None:
    found = back.tensors[number]
    wanted, bits = as_bits(found.name, told[found.name])
    if found.dtype != wanted.dtype or not np.array_equal(back.read(number, Box((), ())), bits):
        raise Mismatch(f"{found.name} is not the number {told[found.name]!r} that it was")
