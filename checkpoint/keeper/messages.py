"""What trainer and keeper say to each other over a unix socket: length-prefixed JSON, and one open file."""

import json
import socket
import struct
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from checkpoint.engine.contract import (
    Content,
    Durable,
    Failed,
    Handling,
    Outcome,
    Skipped,
    Slot,
    SnapshotPlan,
    Ticket,
)
from checkpoint.engine.held import Held
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import KeeperLost
from checkpoint.format.codec import Buffer, Codec
from checkpoint.format.layout import Box
from checkpoint.format.manifest import decode_manifest, decode_page, encode_manifest, encode_pages
from checkpoint.format.table import ChunkTable

Message = dict[str, Any]

MAX_MESSAGE_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")
_OUTCOMES: Mapping[str, type[Outcome]] = {kind.__name__: kind for kind in (Durable, Failed, Skipped)}


def send(channel: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message, and duplicates of open files. Raises KeeperLost when the other side is gone."""
    body = json.dumps(message, separators=(",", ":")).encode()
    try:
        if fds:
            socket.send_fds(channel, [_LENGTH.pack(len(body))], list(fds))
            channel.sendall(body)
        else:
            channel.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error


def receive(channel: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Receive one message. Raises KeeperLost when the other side is gone, or sends a longer one."""
    return _body(channel, _exactly(channel, _LENGTH.size), max_bytes)


def send_bytes(channel: socket.socket, buffers: Sequence[Buffer]) -> None:
    """Send what follows a message that told its length. Raises KeeperLost when the other side is gone."""
    try:
        for buffer in buffers:
            channel.sendall(buffer)
    except OSError as error:
        raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error


def receive_bytes(channel: socket.socket, memory: memoryview) -> None:
    """Fill memory with what follows a message. Raises KeeperLost when the other side is gone."""
    while memory.nbytes:
        try:
            num_bytes = channel.recv_into(memory)
        except OSError as error:
            raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error
        if not num_bytes:
            raise KeeperLost("the other side of the keeper's socket is gone")
        memory = memory[num_bytes:]


def receive_with_fd(channel: socket.socket) -> tuple[Message, int | None]:
    """Receive one message and the open file that came with it, if any."""
    try:
        head, fds, _, _ = socket.recv_fds(channel, _LENGTH.size, 1, socket.MSG_WAITALL)
    except OSError as error:
        raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error
    if len(head) < _LENGTH.size:
        raise KeeperLost("the other side of the keeper's socket is gone")
    return _body(channel, head, MAX_MESSAGE_BYTES), fds[0] if fds else None


def ticket_to_wire(ticket: Ticket) -> list[Any]:
    """Write a ticket as plain data."""
    return [ticket.run, ticket.generation, ticket.step, ticket.rank]


def ticket_from_wire(fields: Sequence[Any]) -> Ticket:
    """Read a ticket."""
    return Ticket(*fields)


def plan_to_wire(plan: SnapshotPlan, before: SnapshotPlan | None = None) -> Message:
    """Write a plan as plain data; tensors and slots are left out if they are those of the plan before."""
    content, handling = plan.content, plan.handling
    changing = {
        "hosts": plan.hosts,
        "skeleton": content.skeleton,
        "digest": content.digest,
        "meta": dict(plan.meta),
        "handling": asdict(handling),
    }
    if before and (before.content.tensors, before.slots) == (content.tensors, plan.slots):
        return changing
    return {
        **changing,
        "tensors": [[spec.name, spec.dtype, spec.shape] for spec in content.tensors],
        "slots": [
            [slot.tensor, slot.box.start, slot.box.size, slot.offset, slot.num_bytes] for slot in plan.slots
        ],
    }


def plan_from_wire(fields: Message, before: SnapshotPlan | None = None) -> SnapshotPlan:
    """Read a plan; `before` is the one that the same client sent before."""
    if before is not None and "slots" not in fields:
        tensors, slots = before.content.tensors, before.slots
    else:
        tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in fields["tensors"])
        slots = tuple(
            Slot(tensor, Box(tuple(start), tuple(size)), offset, num_bytes)
            for tensor, start, size, offset, num_bytes in fields["slots"]
        )
    handling = {**fields["handling"], "codec": Codec(fields["handling"]["codec"])}
    return SnapshotPlan(
        hosts=tuple(fields["hosts"]),
        content=Content(tensors, fields["skeleton"], fields["digest"]),
        meta=fields["meta"],
        handling=Handling(**handling),
        slots=slots,
    )


def held_to_wire(held: Held) -> Message:
    """Write what is held as plain data, but for the memory, which is shared already."""
    return {
        "manifest": b64encode(encode_manifest(held.manifest)).decode(),
        "pages": [b64encode(page).decode() for page, _ in encode_pages(held.chunks)],
    }


def held_from_wire(fields: Message, memory: memoryview) -> Held:
    """Read what is held."""
    manifest = decode_manifest(b64decode(fields["manifest"]), "a held snapshot")
    pages = [decode_page(b64decode(page), "a held snapshot's index") for page in fields["pages"]]
    return Held(manifest, ChunkTable.concat(pages), memory)


def outcome_to_wire(outcome: Outcome) -> Message:
    """Write an outcome as plain data."""
    return {"kind": type(outcome).__name__, **{name: getattr(outcome, name) for name in outcome.__slots__}}


def outcome_from_wire(fields: Message) -> Outcome:
    """Read an outcome."""
    return _OUTCOMES[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})


def timeval(seconds: float) -> bytes:
    """Return a time as the socket options that limit waiting want it."""
    whole = int(seconds)
    return whole.to_bytes(8, "little") + int((seconds - whole) * 1e6).to_bytes(8, "little")


def peer_pid(channel: socket.socket) -> int:
    """Return the process on the other side of a unix socket."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(credentials)
    return int(pid)


def _body(channel: socket.socket, head: bytes, max_bytes: int) -> Message:
    (num_bytes,) = _LENGTH.unpack(head)
    if num_bytes > max_bytes:
        raise KeeperLost(f"a message of {num_bytes} bytes is none of the keeper's")
    message: Message = json.loads(_exactly(channel, num_bytes))
    return message


def _exactly(channel: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        try:
            part = channel.recv(num_bytes - len(parts))
        except OSError as error:
            raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error
        if not part:
            raise KeeperLost("the other side of the keeper's socket is gone")
        parts += part
    return bytes(parts)
