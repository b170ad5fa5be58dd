"""How metadata is wrapped: one line a person can read, with length and checksum of what follows.

    {"holdfast": "manifest", "version": 1, "num_bytes": 1234, "xxh3_128": "..."}
    ...1234 bytes...

A file that was edited, cut short or lengthened is refused before a byte of its body is believed.
"""

import json

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.json_fields import Fields, parse_json

VERSION = 1
_HEAD_BYTES = 256
_MAX_BODY_BYTES = 1 << 40


def seal(kind: str, body: bytes) -> bytes:
    """Wrap the body of a kind of metadata."""
    head = {"holdfast": kind, "version": VERSION, "num_bytes": len(body), "xxh3_128": checksum(body).hex()}
    return json.dumps(head).encode("ascii") + b"\n" + body


def unseal(kind: str, data: Buffer, where: str) -> memoryview:
    """Return the body, exactly as it was sealed.

    Raises Corrupt if it is not, Unsupported if another version wrote it; both name `where` it was read.
    """
    view = memoryview(data).cast("B")
    line, newline, _ = bytes(view[:_HEAD_BYTES]).partition(b"\n")
    head = parse_json(line, where) if newline else None
    if not isinstance(head, dict) or head.get("holdfast") != kind or type(head.get("version")) is not int:
        raise Corrupt(f"{where} does not begin as a {kind} does: it is damaged, or something else")
    _check_version(head["version"], where)
    fields = Fields({name: head[name] for name in head if name not in ("holdfast", "version")}, where)
    num_bytes = fields.count("num_bytes", _MAX_BODY_BYTES)
    digest = fields.text("xxh3_128", r"[0-9a-f]{32}")
    fields.end()
    body = view[len(line) + 1 :]
    if len(body) != num_bytes:
        raise Corrupt(f"{where} holds {len(body)} bytes instead of {num_bytes}: it was cut short or edited")
    if checksum(body).hex() != digest:
        raise Corrupt(f"the checksum of {where} does not agree: it was edited or damaged")
    return body


def _check_version(version: object, where: str) -> None:
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
