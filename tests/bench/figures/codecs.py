"""The codec on a real training's weights and Adam moments, beside plain zstandard at the same level."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch
import zstandard

from checkpoint import Codec, SavePolicy
from checkpoint.format.codec import Buffer, decode, encode, xor_bytes
from checkpoint.format.frames import compress_by_entropy
from checkpoint.format.records import MAX_CHUNK_BYTES
from tests.bench.figures.session import rounds
from tests.bench.figures.trained import Trained, trained
from tests.bench.harness import Effort, Goal, Row, row

_LEVEL = SavePolicy().level
_NUM_STEPS, _STEPS = 240, (121, 201)  # in the middle of the schedule, and near its end
_QUICK_STEPS = (24, (12, 24))
_ZSTD = f"zstandard {_LEVEL}"
_PASSES = 4  # in a turn: one takes a few milliseconds, and would mostly show how slowly anything begins


@dataclass(frozen=True, slots=True)
class _Content:
    """Some of the state, in chunks as they are stored."""

    dtype: str
    chunks: Sequence[np.ndarray]

    @property
    def num_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)


@dataclass(slots=True)
class _Encoded:
    """What became of a content, and the seconds that took."""

    num_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def codec(effort: Effort) -> list[Row]:
    """Measure sizes and speeds (of CPU time), both ways in turn; every chunk has to decode to itself."""
    middle, end = trained(_NUM_STEPS, _STEPS) if effort is Effort.FULL else trained(*_QUICK_STEPS)
    contents = {
        "fp32 weights and moments": _content("float32", [*end.weights, *end.moments]),
        "fp32 weights": _content("float32", end.weights),
        "fp32 moments": _content("float32", end.moments),
        "bf16 weights": _content("bfloat16", _bf16(end.weights)),
        "bf16 moments": _content("bfloat16", _bf16(end.moments)),
    }
    ours: dict[str, _Encoded] = defaultdict(_Encoded)
    plain: dict[str, _Encoded] = defaultdict(_Encoded)
    turns: list[Callable[[], None]] = [
        partial(work, contents[name], encoded[name])
        for name in contents
        for encoded, work in ((ours, _planes), (plain, _plain))
    ]
    bf16 = contents["bf16 weights"]
    coded, at_least = _half_bytes(bf16), list[float]()
    turns.append(lambda: at_least.append(_coding_s(bf16, coded)))
    rounds(2 if effort is Effort.QUICK else 7, turns)
    rows = []
    for name, bound in zip(contents, (None, 0.85, 0.85, 0.69, 0.69), strict=True):
        rows += _rows(f"codec, {name} ({end})", contents[name], (ours[name], plain[name]), bound)
    speeds = [
        _gb_per_s(content, [_decoding_s(content)]) for content in (contents["fp32 weights and moments"],)
    ]
    return [
        *rows,
        row(
            "codec, bf16 weights: control, a copy, and entropy coding of half a byte of each number",
            "GB/s",
            ours=_gb_per_s(bf16, at_least),
            peers={_ZSTD: _gb_per_s(bf16, plain["bf16 weights"].seconds)},
            better="higher",
        ),
        row("codec, fp32 weights and moments: decoding speed", "GB/s", ours=speeds[0]),
        _delta_row(end, Goal("<=", 0.25)),
        _delta_row(middle, None),
    ]


def _rows(name: str, content: _Content, both: tuple[_Encoded, _Encoded], bound: float | None) -> list[Row]:
    """Make the rows of one content; sizes are against the bound, or else against zstandard's."""
    ours, plain = both
    return [
        row(
            f"{name}: stored / raw",
            "",
            ours=ours.num_bytes / content.num_bytes,
            peers={_ZSTD: plain.num_bytes / content.num_bytes},
            goal=Goal("<=", 1.0, of="ratio") if bound is None else Goal("<=", bound),
        ),
        row(
            f"{name}: encoding speed, one core",
            "GB/s",
            ours=_gb_per_s(content, ours.seconds),
            peers={_ZSTD: _gb_per_s(content, plain.seconds)},
            better="higher",
            goal=Goal(">=", 2.0, of="ratio"),
        ),
    ]


def _delta_row(state: Trained, goal: Goal | None) -> Row:
    now = _content("bfloat16", _bf16(state.weights))
    before = _content("bfloat16", _bf16(state.weights_before))
    deltas = [xor_bytes(one.data, other.data) for one, other in zip(now.chunks, before.chunks, strict=True)]
    encoded = _Encoded()
    _planes(_Content("bfloat16", [np.frombuffer(delta, np.uint8) for delta in deltas]), encoded)
    plain = _Encoded()
    _plain(_Content("bfloat16", [np.frombuffer(delta, np.uint8) for delta in deltas]), plain)
    return row(
        f"codec, XOR delta of consecutive bf16 weights ({state}): stored / raw",
        "",
        ours=encoded.num_bytes / now.num_bytes,
        peers={_ZSTD: plain.num_bytes / now.num_bytes},
        goal=goal,
    )


def _planes(content: _Content, encoded: _Encoded) -> None:
    _timed(content, encoded, lambda data: encode(Codec.PLANES, data, _LEVEL, dtype=content.dtype))
    if len(encoded.seconds) == 1:
        for chunk in content.chunks:
            how, data = encode(Codec.PLANES, chunk.data, _LEVEL, dtype=content.dtype)
            if bytes(decode(how, data, chunk.nbytes)) != chunk.tobytes():
                raise RuntimeError("a chunk does not decode to itself")


def _plain(content: _Content, encoded: _Encoded) -> None:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    _timed(content, encoded, lambda data: (Codec.ZSTD, compressor.compress(data)))


def _timed(
    content: _Content, encoded: _Encoded, encode_one: Callable[[Buffer], tuple[Codec, Buffer]]
) -> None:
    """Encode chunk by chunk; as in a save, one is gone before the next is made."""
    started = time.thread_time()
    for _ in range(_PASSES):
        encoded.num_bytes = sum(len(encode_one(chunk.data)[1]) for chunk in content.chunks)
    encoded.seconds.append((time.thread_time() - started) / _PASSES)


def _half_bytes(content: _Content) -> list[bytes]:
    """Return as much for each chunk as its exponents' codes take, and spread as they are."""
    kept = []
    for chunk in content.chunks:
        numbers = chunk[: chunk.size // 4 * 4].view(np.uint32)
        exponents = [(numbers >> place).astype(np.uint8) for place in (7, 23)]
        codes = [np.minimum(each.max(initial=0) - each, 15) for each in exponents]
        kept.append((codes[0] | codes[1] << 4).tobytes())
    return kept


def _coding_s(content: _Content, half_bytes: Sequence[bytes]) -> float:
    """Return the seconds that no codec of this kind can do without."""
    started = time.thread_time()
    for _ in range(_PASSES):
        for chunk, codes in zip(content.chunks, half_bytes, strict=True):
            chunk.copy()
            compress_by_entropy(codes)
    return (time.thread_time() - started) / _PASSES


def _decoding_s(content: _Content) -> float:
    stored = [
        (encode(Codec.PLANES, each.data, _LEVEL, dtype=content.dtype), each.nbytes) for each in content.chunks
    ]
    started = time.thread_time()
    for (how, data), num_bytes in stored:
        decode(how, data, num_bytes)
    return time.thread_time() - started


def _content(dtype: str, tensors: Sequence[torch.Tensor]) -> _Content:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    return _Content(
        dtype,
        [
            each[start : start + MAX_CHUNK_BYTES]
            for each in raw
            for start in range(0, each.size, MAX_CHUNK_BYTES)
        ],
    )


def _bf16(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.bfloat16() for tensor in tensors]


def _gb_per_s(content: _Content, seconds: Sequence[float]) -> float:
    return content.num_bytes / 1e9 / median(seconds)
