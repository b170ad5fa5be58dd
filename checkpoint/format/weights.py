"""What each word of a tensor counts for in its fingerprint: weight(g) = A(g mod 4096) * B(g div 4096)."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # words that share one B
WORD_BYTES = 4
MODULUS = 1 << 64

_C1 = 0x486F6C6466617374  # "Holdfast"
_C2 = 0x636865636B707431  # "checkpt1"
_NUM_KNOWN_B = 1 << 16  # those of the first GiB are looked up

Weights = NDArray[np.uint64]


@lru_cache(maxsize=1)
def weights_in_block() -> Weights:
    """Return A."""
    return constant(_splitmix64_odd(np.arange(BLOCK, dtype=np.uint64), _C1))


def weights_of_blocks(numbers: Weights) -> Weights:
    """Return B of some blocks."""
    return _splitmix64_odd(numbers, _C2)


def weights_from(number: int, num_blocks: int) -> Weights:
    """Return B of some blocks, one after the other."""
    if number + num_blocks <= _NUM_KNOWN_B:
        return _known()[number : number + num_blocks]
    return weights_of_blocks(np.arange(number, number + num_blocks, dtype=np.uint64))


@lru_cache(maxsize=1024)
def weight_of_block(number: int) -> int:
    """Return B of one block."""
    return int(weights_of_blocks(np.array([number], np.uint64))[0])


def constant(table: Weights) -> Weights:
    """Return a table that nobody writes to any more."""
    table.setflags(write=False)
    return table


@lru_cache(maxsize=1)
def _known() -> Weights:
    return constant(weights_of_blocks(np.arange(_NUM_KNOWN_B, dtype=np.uint64)))


def _splitmix64_odd(index: Weights, offset: int) -> Weights:
    """Return splitmix64(index + offset) | 1 (Steele, Lea, Flood 2014), modulo 2^64."""
    z = index + np.uint64(offset)
    z += np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Weights = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return result
