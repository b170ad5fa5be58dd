"""What trainer and keeper say to each other over a unix socket: length-prefixed JSON, and one open file."""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
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
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import KeeperLost
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box

Message = dict[str, Any]

MAX_MESSAGE_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")
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


def receive(channel: socket.socket) -> Message:
    """Receive one message. Raises KeeperLost when the other side is gone."""
    return _body(channel, _exactly(channel, _LENGTH.size))


def receive_with_fd(channel: socket.socket) -> tuple[Message, int | None]:
    """Receive one message and the open file that came with it, if any."""
    try:
        head, fds, _, _ = socket.recv_fds(channel, _LENGTH.size, 1, socket.MSG_WAITALL)
    except OSError as error:
        raise KeeperLost(f"the other side of the keeper's socket is gone: {error}") from error
    if len(head) < _LENGTH.size:
        raise KeeperLost("the other side of the keeper's socket is gone")
    return _body(channel, head), fds[0] if fds else None


def ticket_to_wire(ticket: Ticket) -> list[Any]:
    """Write a ticket as plain data."""
    return [ticket.run, ticket.generation, ticket.step, ticket.rank]


def ticket_from_wire(fields: Sequence[Any]) -> Ticket:
    """Read a ticket."""
    return Ticket(*fields)


def plan_to_wire(plan: SnapshotPlan) -> Message:
    """Write a plan as plain data."""
    content, handling = plan.content, plan.handling
    return {
        "hosts": plan.hosts,
        "tensors": [[spec.name, spec.dtype, spec.shape] for spec in content.tensors],
        "skeleton": content.skeleton,
        "digest": content.digest,
        "meta": dict(plan.meta),
        "handling": [int(handling.codec), handling.level, handling.when_full, handling.max_wait_s],
        "slots": [
            [slot.tensor, slot.box.start, slot.box.size, slot.offset, slot.num_bytes] for slot in plan.slots
        ],
    }


def plan_from_wire(fields: Message) -> SnapshotPlan:
    """Read a plan."""
    tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in fields["tensors"])
    codec, level, when_full, max_wait_s = fields["handling"]
    return SnapshotPlan(
        hosts=tuple(fields["hosts"]),
        content=Content(tensors, fields["skeleton"], fields["digest"]),
        meta=fields["meta"],
        handling=Handling(Codec(codec), level, when_full, max_wait_s),
        slots=tuple(
            Slot(tensor, Box(tuple(start), tuple(size)), offset, num_bytes)
            for tensor, start, size, offset, num_bytes in fields["slots"]
        ),
    )


def outcome_to_wire(outcome: Outcome) -> Message:
    """Write an outcome as plain data."""
    return {"kind": type(outcome).__name__, **{name: getattr(outcome, name) for name in outcome.__slots__}}


def outcome_from_wire(fields: Message) -> Outcome:
    """Read an outcome."""
    return _OUTCOMES[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})


def _body(channel: socket.socket, head: bytes) -> Message:
    (num_bytes,) = _LENGTH.unpack(head)
    if num_bytes > MAX_MESSAGE_BYTES:
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
