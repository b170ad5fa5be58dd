"""Hands the whole state from one rank to others: a JSON header, the tensors' bytes in pieces, then proof."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint import fingerprint_tensor, flatten_state, unflatten_state
from elastic.training.ports import Broken, World

PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Parcel:
    """A state, where its holder has it from ("fresh", "self", or what it was restored from), and what a
    person should know of that.
    """

    state: Any
    origin: str
    note: str = ""


def hand_over(world: World, receivers: Sequence[int], parcel: Parcel, device: torch.device) -> None:
    """Send a state to each of the receivers, which call `accept`. Raises Broken."""
    skeleton, tensors = flatten_state(parcel.state)
    described = [
        [
            name,
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            tensor.device.type,
            fingerprint_tensor(tensor),
        ]
        for name, tensor in tensors.items()
    ]
    header = json.dumps(
        {"skeleton": skeleton, "tensors": described, "origin": parcel.origin, "note": parcel.note}
    ).encode()
    for receiver in receivers:
        world.send(torch.tensor([len(header)]), receiver)
        world.send(torch.frombuffer(bytearray(header), dtype=torch.uint8), receiver)
    staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
    for pieces in _batches(_raw(tensor.detach().contiguous()) for tensor in tensors.values()):
        filled = _fill(staging, pieces)
        for receiver in receivers:
            world.send(filled, receiver)


def accept(world: World, source: int, device: torch.device) -> Parcel:
    """Receive a state from the source into new memory. Raises Broken, also when it arrived changed."""
    length = torch.zeros(1, dtype=torch.int64)
    world.receive(length, source)
    text = torch.empty(int(length), dtype=torch.uint8)
    world.receive(text, source)
    header = json.loads(text.numpy().tobytes())
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, place, _ in header["tensors"]:
        tensors[name] = torch.empty(
            shape, dtype=getattr(torch, dtype), device="cpu" if place == "cpu" else device
        )
    staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
    for pieces in _batches(map(_raw, tensors.values())):
        filled = staging[: sum(piece.numel() for piece in pieces)]
        world.receive(filled, source)
        for piece, arrived in zip(
            pieces, torch.split(filled, [piece.numel() for piece in pieces]), strict=True
        ):
            piece.copy_(arrived)
    for name, *_, fingerprint in header["tensors"]:
        if fingerprint_tensor(tensors[name]) != fingerprint:
            raise Broken(world.generation, f"{name} arrived changed from rank {source}")
    return Parcel(unflatten_state(header["skeleton"], tensors), header["origin"], header["note"])


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _fill(staging: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    at = 0
    for piece in pieces:
        staging[at : at + piece.numel()].copy_(piece)
        at += piece.numel()
    return staging[:at]


def _batches(raw: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Cut byte tensors into pieces, and gather these into batches of exactly PIECE_BYTES but for the last."""
    batch: list[Tensor] = []
    room = PIECE_BYTES
    for whole in raw:
        rest = whole
        while rest.numel():
            batch.append(rest[:room])
            rest, room = rest[room:], room - batch[-1].numel()
            if not room:
                yield batch
                batch, room = [], PIECE_BYTES
    if batch:
        yield batch
