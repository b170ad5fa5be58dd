"""The step that an optimizer has done, as DeepSpeed's files keep it: a number, or a tensor of one element."""

import math
from dataclasses import replace
from typing import Any

from checkpoint.errors import Corrupt
from checkpoint.format.box import Box
from checkpoint.interop.formats.archive import Archive, Stored
from checkpoint.interop.formats.contract import Array
from checkpoint.interop.formats.extents import read_box
from checkpoint.interop.formats.tiles import as_bits
from checkpoint.interop.moves import Foreign
from checkpoint.interop.place import Place


def read_step(place: Place, archive: Archive, step: Any, path: str) -> tuple[Foreign, Array]:
    """Return a step as a tensor without dims, and its bits. Raises Corrupt if it is no number."""
    if isinstance(step, Stored) and math.prod(step.shape) == 1:
        extent = replace(archive.locate(step), shape=(), strides=())
        return Foreign("step", step.dtype, ()), read_box(place, extent, Box((), ()))
    if type(step) not in (int, float):
        raise Corrupt(f"{path} does not say which step its optimizer has done")
    return as_bits("step", step)
