"""Values that differ from rank to rank (random states, data cursors), saved without any rank asking another.

Each rank fills its own row of one tensor of bytes: two lengths, a JSON head, the bytes of small tensors. The
rows have a fixed size, so that every rank knows the tensor's shape beforehand.
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.engine.tensors import (
    FlatState,
    dtype_name,
    flatten_state,
    raw_bytes,
    torch_dtype,
    unflatten_state,
)
from checkpoint.errors import Corrupt, FormatError, Unsupported
from checkpoint.format.dtypes import itemsize
from checkpoint.format.json_fields import Fields, parse_json

DEFAULT_ROW_BYTES = 32 << 10
_LENGTHS = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class PerRank:
    """A leaf of a state whose value is this rank's own: plain data and small tensors.

    It takes `max_bytes` per rank, the same on all ranks.
    """

    value: Any
    max_bytes: int = DEFAULT_ROW_BYTES

    def row(self, name: str = "a per-rank value") -> torch.Tensor:
        """Return this rank's row, of shape (1, max_bytes).

        Raises FormatError, under this `name`, for what has no plain form or does not fit.
        """
        skeleton, tensors = self._taken_apart(name)
        described = [[name, dtype_name(each.dtype), list(each.shape)] for name, each in tensors.items()]
        head = json.dumps({"skeleton": skeleton, "tensors": described}, allow_nan=False).encode()
        body = b"".join(raw_bytes(tensor).tobytes() for tensor in tensors.values())
        row = _LENGTHS.pack(len(head), len(body)) + head + body
        if len(row) > self.max_bytes:
            raise Unsupported(
                f"{name} takes {len(row)} bytes of this rank and has room for {self.max_bytes}: "
                f"give PerRank(value, max_bytes={1 << (len(row) - 1).bit_length()}), the same on every rank"
            )
        return torch.frombuffer(bytearray(row.ljust(self.max_bytes, b"\0")), dtype=torch.uint8).reshape(1, -1)

    def _taken_apart(self, name: str) -> FlatState:
        try:
            return flatten_state(self.value)
        except FormatError as error:
            raise Unsupported(f"{name}/{error}") from None


def per_rank_values(rows: torch.Tensor) -> list[Any]:
    """Return the values that the ranks of the world that saved it gave, by rank. Raises Corrupt."""
    if rows.dtype is not torch.uint8 or rows.dim() != 2:
        raise Corrupt(
            f"a {dtype_name(rows.dtype)} tensor of shape {list(rows.shape)} holds no per-rank values"
        )
    return [_value(bytes(raw_bytes(row))) for row in rows]


def _value(row: bytes) -> Any:
    where = "a per-rank value"
    if len(row) < _LENGTHS.size:
        raise Corrupt(f"{where} is cut short")
    head_bytes, body_bytes = _LENGTHS.unpack_from(row)
    start = _LENGTHS.size + head_bytes
    if start + body_bytes > len(row):
        raise Corrupt(f"{where} says that it is longer than its row")
    head = Fields(parse_json(row[_LENGTHS.size : start], where), where)
    skeleton, listed = head.json("skeleton"), head.items("tensors", body_bytes + 1)
    head.end()
    body = memoryview(row)[start : start + body_bytes]
    tensors: dict[str, torch.Tensor] = {}
    for node in listed:
        match node:
            case [str(name), str(dtype), list(sizes)]:
                shape = [n for n in sizes if isinstance(n, int) and n >= 0]
                num_bytes = math.prod(shape) * itemsize(dtype)
            case _:
                raise Corrupt(f"{where} lists a tensor as {str(node)[:80]}")
        if len(shape) != len(sizes):
            raise Corrupt(f"{where} lists a tensor {name[:80]!r} of shape {str(sizes)[:80]}")
        if num_bytes > len(body):
            raise Corrupt(f"{where} lists a tensor {name[:80]!r} that is longer than what is left of it")
        raw = torch.frombuffer(bytearray(body[:num_bytes] or b"\0"), dtype=torch.uint8)[:num_bytes]
        tensors[name] = raw.view(torch_dtype(dtype)).reshape(shape)
        body = body[num_bytes:]
    return unflatten_state(skeleton, tensors)
