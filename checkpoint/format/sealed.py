"""How metadata is wrapped: one line a person can read, with length and checksum of what follows.

    {"holdfast": "manifest", "version": 0, "num_bytes": 1234, "xxh3_128": "..."}
    ...1234 bytes...

A file that was edited, cut short or lengthened is refused before a byte of its body is believed.
"""

import json

from checkpoint.errors import Corrupt, Unsupported
from checkpoint.format.codec import Buffer, checksum
from checkpoint.format.json_fields import parse_json

VERSION = 0
_HEAD_BYTES = 256


def seal(kind: str, body: bytes) -> bytes:
    """Wrap the body of a kind of metadata."""
    head = {"holdfast": kind, "version": VERSION, "num_bytes": len(body), "xxh3_128": checksum(body).hex()}
    return json.dumps(head).encode("ascii") + b"\n" + body


def unseal(kind: str, data: Buffer, where: str) -> memoryview:
    """Return the body, exactly as it was sealed.

    Raises Corrupt if it is not, Unsupported if a later version wrote it; both name `where` it was read.
    """
    view = memoryview(data).cast("B")
    line, newline, _ = bytes(view[:_HEAD_BYTES]).partition(b"\n")
    head = parse_json(line, where) if newline else None
    match head:
        case {"holdfast": str(found), "version": int(version)} if found == kind and version != VERSION:
            raise Unsupported(
                f"{where} is of format version {version}; this release reads {VERSION}: upgrade holdfast"
            )
        case {
            "holdfast": str(found),
            "version": int(),
            "num_bytes": int(num_bytes),
            "xxh3_128": str(digest),
        } if found == kind:
            body = view[len(line) + 1 :]
        case _:
            raise Corrupt(f"{where} does not begin as a {kind} does: it is damaged, or something else")
    if len(body) != num_bytes:
        raise Corrupt(f"{where} holds {len(body)} bytes instead of {num_bytes}: it was cut short or edited")
    if checksum(body).hex() != digest:
        raise Corrupt(f"the checksum of {where} does not agree: it was edited or damaged")
    return body
