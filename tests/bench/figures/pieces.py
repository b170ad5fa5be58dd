"""The parts by themselves: fingerprint, parity, and the index of a checkpoint of a million chunks."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np

from checkpoint.format.box import Box
from checkpoint.format.codec import checksum
from checkpoint.format.fingerprint import fingerprint
from checkpoint.redundancy.codes import code_of
from tests.bench.figures.session import rounds
from tests.bench.harness import Effort, Goal, Row, row

_NUM_BYTES = 256 << 20
_CHUNK_BYTES = 4 << 20
_NUM_DATA = 4  # rows that one parity protects


def fingerprint_speed(effort: Effort) -> list[Row]:
    """Measure the fingerprint of chunks, one core, beside a memcpy and the checksum of the same bytes."""
    words = np.random.default_rng(0).integers(0, 1 << 32, _NUM_BYTES // 4, np.uint32)
    raw, copy = words.view(np.uint8), np.empty(_NUM_BYTES, np.uint8)

    def of_dtype(dtype: str, itemsize: int) -> None:
        shape = (_NUM_BYTES // itemsize,)
        for start in range(0, _NUM_BYTES, _CHUNK_BYTES):
            box = Box((start // itemsize,), (_CHUNK_BYTES // itemsize,))
            fingerprint(raw[start : start + _CHUNK_BYTES], dtype, shape, box)

    speeds = _speeds(
        {
            "float32": lambda: of_dtype("float32", 4),
            "bfloat16": lambda: of_dtype("bfloat16", 2),
            "memcpy": lambda: np.copyto(copy, raw),
            "xxh3_128": lambda: checksum(raw.data),
        },
        num_bytes=_NUM_BYTES,
        effort=effort,
    )
    controls = {name: speeds[name] for name in ("memcpy", "xxh3_128")}
    return [
        row(
            f"fingerprint of {dtype} chunks, one core",
            "GB/s",
            ours=speeds[dtype],
            peers=controls,
            better="higher",
            goal=Goal(">=", 3.0),
        )
        for dtype in ("float32", "bfloat16")
    ]


def parity_speed(effort: Effort) -> list[Row]:
    """Measure encoding and rebuilding, in bytes of the data that is protected, beside a memcpy of it."""
    rows = np.random.default_rng(0).integers(0, 256, (_NUM_DATA, _NUM_BYTES // _NUM_DATA), np.uint8)
    pieces, copy = [each.data for each in rows], np.empty_like(rows)
    xor, solomon = code_of(_NUM_DATA, 1), code_of(_NUM_DATA, 2)
    xor_parity, solomon_parity = xor.encode(pieces), solomon.encode(pieces)
    left = dict(enumerate(pieces[1:], 1))
    one, two = {0: len(pieces[0])}, {0: len(pieces[0]), 1: len(pieces[1])}
    speeds = _speeds(
        {
            "memcpy": lambda: np.copyto(copy, rows),
            "XOR, encode": lambda: xor.encode(pieces),
            "XOR, rebuild one": lambda: xor.rebuild({**left, 4: xor_parity[0]}, one),
            "Reed-Solomon, encode two": lambda: solomon.encode(pieces),
            "Reed-Solomon, rebuild two": lambda: solomon.rebuild(
                {2: pieces[2], 3: pieces[3], 4: solomon_parity[0], 5: solomon_parity[1]}, two
            ),
        },
        num_bytes=_NUM_BYTES,
        effort=effort,
    )
    memcpy = {"memcpy": speeds.pop("memcpy")}
    return [
        row(
            f"parity over {_NUM_DATA} rows: {name}",
            "GB/s",
            ours=speed,
            peers=memcpy,
            better="higher",
            goal=Goal(">=", 0.5, of="ratio") if name.startswith("XOR") else None,
        )
        for name, speed in speeds.items()
    ]


def _speeds(works: Mapping[str, Callable[[], object]], *, num_bytes: int, effort: Effort) -> dict[str, float]:
    """Do each work in turn, and return its median speed in GB/s."""
    seconds = defaultdict(list)

    def turn(name: str) -> None:
        started = time.perf_counter()
        works[name]()
        seconds[name].append(time.perf_counter() - started)

    for work in works.values():
        work()
    rounds(3 if effort is Effort.QUICK else 9, [partial(turn, name) for name in works])
    return {name: num_bytes / 1e9 / median(each) for name, each in seconds.items()}
