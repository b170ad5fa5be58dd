"""How metadata is wrapped: one line a person can read, with length and checksum of what follows.

    {"holdfast": "manifest", "version": 1, "num_bytes": 1234, "xxh3_128": "..."}
    ...1234 bytes...

A file that was edited, cut short or lengthened is refused before a byte of its body is believed.
"""

import json
from typing import TypeGuard

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.json_fields import Fields, parse_json

VERSION = 1
_HEAD_BYTES = 256
_MAX_BODY_BYTES = 1 << 40


def seal(kind: str, body: Buffer, version: int = VERSION) -> bytes:
    """Wrap the body of a kind of metadata."""
    digest = _digest(version, body)
    head = {"holdfast": kind, "version": version, "num_bytes": len(body), "xxh3_128": digest}
    return json.dumps(head).encode("ascii") + b"\n" + bytes(body)


def unseal(kind: str, data: Buffer, where: str) -> memoryview:
    """Return the body, exactly as it was sealed.

    Raises Corrupt if it is not, Unsupported if another version wrote it; both name `where` it was read.
    """
    view = memoryview(data).cast("B")
    line, newline, _ = bytes(view[:_HEAD_BYTES]).partition(b"\n")
    head = parse_json(line, where) if newline else None
    version = head.get("version") if isinstance(head, dict) else None
    if not isinstance(head, dict) or head.get("holdfast") != kind or not _is_number(version):
        raise Corrupt(f"{where} does not begin as a {kind} does: it is damaged, or something else")
    fields = Fields({name: head[name] for name in head if name not in ("holdfast", "version")}, where)
    num_bytes = fields.count("num_bytes", _MAX_BODY_BYTES)
    digest = fields.text("xxh3_128", r"[0-9a-f]{32}")
    if version <= VERSION:
        fields.end()
    body = view[len(line) + 1 :]
    if len(body) != num_bytes:
        raise Corrupt(f"{where} holds {len(body)} bytes instead of {num_bytes}: it was cut short or edited")
    if _digest(version, body) != digest:
        raise Corrupt(f"the checksum of {where} does not agree: it was edited or damaged")
    _check_version(version, where)
    return body


def _is_number(node: object) -> TypeGuard[int]:
    return isinstance(node, int) and not isinstance(node, bool)


def _digest(version: int, body: Buffer) -> str:
    """Return the checksum of a body, and from version 2 on of the version before it.

    A flipped digit of the version is damage, and to be told from what a later release wrote.
    """
    return checksum(body if version <= 1 else b"%d\n" % version + bytes(body)).hex()


def _check_version(version: int, where: str) -> None:
    if version == VERSION:
        return
    if version == 0:
        raise Unsupported(
            f"{where} is of format version 0, of before the first release; this release reads {VERSION}: "
            "save again, or read it with the development version that wrote it"
        )
    raise Unsupported(
        f"{where} is of format version {version}; this release reads {VERSION}: upgrade holdfast"
    )
