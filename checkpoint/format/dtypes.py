"""Element types by name: how many bytes an element has, and the numpy type that carries its bits."""

from dataclasses import dataclass

import numpy as np

from checkpoint.errors import Unsupported


@dataclass(frozen=True, slots=True)
class DType:
    """An element type. `carrier` has the element's size and holds its bits, not its value."""

    name: str
    itemsize: int
    carrier: np.dtype[np.generic]

    @property
    def words(self) -> int:
        """How many words of at most 32 bits an element has."""
        return max(1, self.itemsize // 4)

    @property
    def word(self) -> np.dtype[np.generic]:
        """The unsigned, little-endian numpy type of such a word."""
        return np.dtype(f"<u{min(self.itemsize, 4)}")


_ITEMSIZES = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32 complex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
_CARRIERS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "<c16"}

DTYPES: dict[str, DType] = {
    name: DType(name, itemsize, np.dtype(_CARRIERS[itemsize]))
    for itemsize, names in _ITEMSIZES.items()
    for name in names.split()
}


def dtype_of(name: str) -> DType:
    """Return the element type of this name, as torch spells it without its prefix ("bfloat16").

    Raises Unsupported.
    """
    try:
        return DTYPES[name]
    except KeyError:
        known = ", ".join(sorted(DTYPES))
        raise Unsupported(
            f"there is no dtype {name!r} in this format; convert the tensor to one of: {known}"
        ) from None


def itemsize(name: str) -> int:
    """Return how many bytes an element of the type of this name has. Raises Unsupported."""
    return dtype_of(name).itemsize
