"""What ranks say to each other: short things, as nearly all are, in messages of a fixed size.

torch's own gathering of objects tells the sizes first, which takes as long again; and a restore says little.
All goes by way of rank 0: gloo's `all_gather` passes everything round a ring, a step for each rank, and where
there are more ranks than cores each step waits for its turn.
"""

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_ROOM_BYTES = 4096
_LENGTH_BYTES = 8


def gathered(said: Any) -> list[Any]:
    """Return what every rank says, by rank. All ranks call it."""
    data = pickle.dumps(said)
    told = _all_of(_framed(data, _ROOM_BYTES))
    most = max(map(_length_of, told))
    if most > _ROOM_BYTES - _LENGTH_BYTES:
        told = _all_of(_framed(data, most + _LENGTH_BYTES))
    return [_said(one) for one in told]


def told_by_first(said: Any) -> Any:
    """Return what rank 0 says; what the others say is not heard. All ranks call it."""
    is_first = dist.get_rank() == 0
    data = pickle.dumps(said) if is_first else b""
    told = _from_first(_framed(data, _ROOM_BYTES))
    if (length := _length_of(told)) > _ROOM_BYTES - _LENGTH_BYTES:
        told = _from_first(_framed(data, length + _LENGTH_BYTES))
    return said if is_first else _said(told)


def _framed(data: bytes, room_bytes: int) -> torch.Tensor:
    """Return the length of some data, and as much of it as there is room for."""
    framed = bytearray(room_bytes)
    framed[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")
    framed[_LENGTH_BYTES : _LENGTH_BYTES + len(data)] = data[: room_bytes - _LENGTH_BYTES]
    return torch.frombuffer(framed, dtype=torch.uint8).to(_device())


def _all_of(framed: torch.Tensor) -> list[bytes]:
    everything = framed.new_empty((dist.get_world_size(), len(framed)))
    dist.gather(framed, list(everything) if dist.get_rank() == 0 else None, dst=0)
    dist.broadcast(everything, src=0)
    return [one.tobytes() for one in everything.cpu().numpy()]


def _from_first(framed: torch.Tensor) -> bytes:
    dist.broadcast(framed, src=0)
    data: bytes = framed.cpu().numpy().tobytes()
    return data


def _length_of(framed: bytes) -> int:
    return int.from_bytes(framed[:_LENGTH_BYTES], "little")


def _said(framed: bytes) -> Any:
    return pickle.loads(memoryview(framed)[_LENGTH_BYTES:])


def _device() -> str:
    """Return where the default group's backend takes bytes from."""
    return distributed_c10d._get_object_coll_device()
