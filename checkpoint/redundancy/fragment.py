"""One block of one row as it lies in a peer's memory: it says what it is, and proves its bytes."""

import struct
from dataclasses import dataclass

import xxhash

from checkpoint.errors import Corrupt
from checkpoint.redundancy.parts import Parts
from checkpoint.store.contract import Buffer

_MAGIC = b"HFpf"
_VERSION = 0
# Magic, version, number of shares, bytes of payload, digests of the name and of the payload; then the shares;
# then the digest of all of that. Little endian.
_HEAD = struct.Struct("<4sHHQ16s16s")
_SHARE = struct.Struct("<Q16sQ16s")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Whole:
    """A host's whole value: how long it is, and its checksum."""

    num_bytes: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Share:
    """What a host has in one block of a stripe: of which value, so many bytes, with this checksum."""

    whole: Whole
    num_bytes: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Fragment:
    """A block of a data row, with its one share; or of a parity row, with the shares of all data rows."""

    shares: tuple[Share, ...]
    payload: Buffer


def whole_of(value: Buffer | Parts) -> Whole:
    """Return what identifies a value."""
    parts = value if isinstance(value, Parts) else Parts([value])
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return Whole(parts.num_bytes, digest.digest())


def is_of(share: Share, block: Buffer) -> bool:
    """Whether a block is, bit for bit, the one that a share speaks of."""
    return memoryview(block).nbytes == share.num_bytes and _digest(block) == share.checksum


def share_of(whole: Whole, block: Buffer) -> Share:
    """Return the share that a block of a value is."""
    return Share(whole, memoryview(block).nbytes, _digest(block))


def encode_fragment(name: str, fragment: Fragment) -> list[Buffer]:
    """Return a fragment's bytes: a head, and the payload itself, uncopied."""
    view = memoryview(fragment.payload).cast("B")
    digests = _digest(name.encode()), _digest(view)
    head = _HEAD.pack(_MAGIC, _VERSION, len(fragment.shares), view.nbytes, *digests)
    head += b"".join(_packed(share) for share in fragment.shares)
    return [head + _digest(head), view]


def payload_offset(num_shares: int) -> int:
    """Return where the payload of a fragment with so many shares begins."""
    return _HEAD.size + num_shares * _SHARE.size + _DIGEST_BYTES


def decode_fragment(name: str, data: Buffer) -> Fragment:
    """Return the fragment of this name, its payload uncopied. Raises Corrupt if a bit of it is wrong."""
    fragment = decode_unproved(name, data)
    payload_digest = _HEAD.unpack_from(memoryview(data).cast("B"))[-1]
    if _digest(fragment.payload) != payload_digest:
        raise Corrupt(f"the bytes of fragment {name} are not those that were put there")
    return fragment


def decode_unproved(name: str, data: Buffer) -> Fragment:
    """Return the fragment of this name, without looking at its payload: for who proves what it is used for.

    Raises Corrupt if it is another one, if its length is wrong, or any bit of its head.
    """
    view = memoryview(data).cast("B")
    if view.nbytes < _HEAD.size:
        raise Corrupt(f"fragment {name} was cut short")
    magic, version, num_shares, num_bytes, name_digest, _ = _HEAD.unpack_from(view)
    if magic != _MAGIC or version != _VERSION or name_digest != _digest(name.encode()):
        raise Corrupt(f"what is kept as fragment {name} is something else")
    end = _HEAD.size + num_shares * _SHARE.size
    payload = view[end + _DIGEST_BYTES :]
    if view[end : end + _DIGEST_BYTES] != _digest(view[:end]):
        raise Corrupt(f"the head of fragment {name} is damaged")
    if payload.nbytes != num_bytes:
        raise Corrupt(f"fragment {name} has {payload.nbytes} bytes instead of {num_bytes}")
    return Fragment(_shares(view[_HEAD.size : end]), payload)


def _packed(share: Share) -> bytes:
    return _SHARE.pack(share.whole.num_bytes, share.whole.checksum, share.num_bytes, share.checksum)


def _shares(packed: Buffer) -> tuple[Share, ...]:
    fields = _SHARE.iter_unpack(packed)
    return tuple(
        Share(Whole(size, digest), num_bytes, checksum) for size, digest, num_bytes, checksum in fields
    )


def _digest(data: Buffer) -> bytes:
    return xxhash.xxh3_128_digest(data)
