"""Golden files: a checkpoint of every released version still reads, to the last bit; others are refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint.errors import Unsupported
from checkpoint.format import fingerprint as fingerprints
from checkpoint.format.codec import Buffer, Codec, checksum, decode, encode, xor_bytes
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.keys import manifest_key
from checkpoint.format.layout import Box
from checkpoint.format.manifest import (
    ChunkRecord,
    Manifest,
    chunks_of_page,
    decode_manifest,
    encode_manifest,
    encode_page,
)
from checkpoint.format.pack import ELSEWHERE, TRAILER_BYTES, decode_pack_index, index_range
from checkpoint.format.table import decode_table, encode_table
from checkpoint.store.contract import ByteRange
from checkpoint.store.local import LocalStore
from tests.format_samples import Bits
from tests.golden_samples import STEPS, golden_skeleton, golden_tensors
from tests.summings import WAYS, summing_by

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def store(tmp_path) -> LocalStore:
    """A copy of the golden store of version 1."""
    return LocalStore(shutil.copytree(GOLDEN / "manifest_v1", tmp_path / "store"))


def manifest_of(store: LocalStore, step: int) -> Manifest:
    return decode_manifest(store.read(manifest_key(step))[0], manifest_key(step))


def content(store: LocalStore, manifest: Manifest, chunk: ChunkRecord) -> Buffer:
    """Read a chunk as docs/format.md says: what is stored, XOR the content of its base."""
    (stored,) = store.read(manifest.packs[chunk.pack].key, [ByteRange(chunk.offset, chunk.num_bytes)])
    raw = decode(chunk.codec, stored, chunk.box.numel * itemsize(manifest.tensors[chunk.tensor].dtype))
    raw = raw if chunk.base is None else xor_bytes(raw, content(store, manifest, chunk.base))
    assert checksum(raw) == chunk.checksum
    return raw


@pytest.mark.parametrize("step", STEPS)
def test_version_1_still_reads_to_the_last_bit(store, step: int):
    manifest = manifest_of(store, step)
    assert (manifest.version, manifest.run, manifest.generation, manifest.token) == (1, "golden", 1, "token")
    assert (manifest.skeleton, manifest.meta) == (golden_skeleton(step), {"note": "made by hand"})
    assert manifest.data_cursor == {"epoch": 1, "sample": 640}
    assert manifest.metrics == {"loss": 2.5, "grad_norm": float("inf")}
    found: dict[str, Bits] = {
        tensor.name: np.zeros(tensor.shape, dtype_of(tensor.dtype).carrier) for tensor in manifest.tensors
    }
    for page in manifest.pages:
        for chunk in chunks_of_page(manifest, page, store.read(page.key)[0]):
            raw = content(store, manifest, chunk)
            tensor = manifest.tensors[chunk.tensor]
            assert fingerprint(raw, tensor.dtype, tensor.shape, chunk.box) == chunk.fingerprint
            target = found[tensor.name]
            here = chunk.box.within(Box.whole(tensor.shape))
            target[here] = np.frombuffer(raw, target.dtype).reshape(chunk.box.size)
    for (name, (dtype, bits)), tensor in zip(golden_tensors(step).items(), manifest.tensors, strict=True):
        assert (tensor.name, tensor.dtype) == (name, dtype)
        assert (found[name] == bits).all()
        assert fingerprint(bits.tobytes(), dtype, bits.shape, Box.whole(bits.shape)) == tensor.fingerprint


def test_the_golden_checkpoints_have_every_codec_deltas_and_shared_chunks(store):
    chunks = {
        step: chunks_of_page(manifest, manifest.pages[0], store.read(manifest.pages[0].key)[0])
        for step in STEPS
        for manifest in [manifest_of(store, step)]
    }
    assert {chunk.codec for chunk in chunks[4]} == set(Codec)
    assert [max(chunk.num_bases for chunk in chunks[step]) for step in STEPS] == [0, 1, 2]
    table = [[chunk for chunk in chunks[step] if chunk.tensor == 1] for step in STEPS]
    assert table[0] == table[1] == table[2]


@pytest.mark.parametrize("step", STEPS)
def test_version_1_is_written_as_it_was(store, step: int):
    manifest = manifest_of(store, step)
    (ref,) = manifest.pages
    page = store.read(ref.key)[0]
    table = chunks_of_page(manifest, ref, page)
    assert encode_page(table) == encode_page(list(table)) == bytes(page)
    assert encode_manifest(manifest) == bytes(store.read(manifest_key(step))[0])


def test_the_packs_of_version_1_tell_what_is_in_them(store):
    for number, step in enumerate(STEPS):
        manifest = manifest_of(store, step)
        pack = store.read(manifest.packs[number].key)[0]
        offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "golden")
        index = decode_pack_index(pack[offset : offset + length], len(pack))
        assert (index.generation, index.host, index.seq) == (1, "h0", step)
        page = chunks_of_page(manifest, manifest.pages[0], store.read(manifest.pages[0].key)[0])
        own = [chunk for chunk in page if chunk.pack == number]
        assert [chunk.checksum for chunk in index.chunks] == [chunk.checksum for chunk in own]
        assert {chunk.base.pack for chunk in index.chunks if chunk.base} <= {ELSEWHERE}


def test_the_golden_files_are_the_ones_that_were_released():
    digests = {
        path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((GOLDEN / "manifest_v1").rglob("*"))
        if path.is_file()
    }
    assert digests == json.loads((GOLDEN / "manifest_v1.json").read_text())


def test_what_was_written_before_the_first_release_is_refused_and_the_error_says_so():
    data = (GOLDEN / "manifest_v0").read_bytes()
    with pytest.raises(Unsupported, match=r"manifests/4 is of format version 0, of before the first release"):
        decode_manifest(data, "manifests/4")


VECTORS = [
    ("float32", (4,), Box((0,), (4,)), bytes(range(16)), 0xA40925021B84A070),
    ("bfloat16", (8,), Box((0,), (8,)), bytes(range(16)), 0xA40925021B84A070),
    ("complex128", (), Box((), ()), bytes(range(16)), 0xA40925021B84A070),
    ("float32", (4096, 2), Box((2048, 0), (1, 2)), bytes(range(8)), 0x2B5D49A03E793ABC),
    ("bfloat16", (9000,), Box((8191,), (2,)), bytes(range(4)), 0x01ADF5B947A37A52),
    ("uint8", (3, 3), Box((1, 1), (2, 2)), bytes([1, 2, 3, 4]), 0x71041D233E3F7C2D),
]


@pytest.mark.parametrize(("dtype", "shape", "box", "raw", "expected"), VECTORS)
@pytest.mark.parametrize("way", WAYS)
def test_fingerprints_are_those_of_the_format_document(
    dtype, shape, box, raw, expected, way, repository: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fingerprints, "_sums", summing_by(way))
    assert fingerprint(raw, dtype, shape, box) == expected
    assert f"{expected:016x}" in (repository / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_checksum_is_that_of_the_format_document(repository: Path):
    digest = checksum(bytes(range(16))).hex()
    assert digest in (repository / "docs" / "format.md").read_text(encoding="utf-8")


NUMBERS = np.array([0x3F80, 0xC020, 0x0000, 0x4040, 0x3F80, 0x3000], "<u2")  # 1, -2.5, 0, 3, 1 and 2^-31
PLANES = [  # these numbers in bfloat16: their exponents as they are, and as codes of all kinds
    "0202 0100 06000000 0100 06000000 004100800000 7f8000807f60",
    "0202 0100 06000000 0102 12000000 004100800000 800c000000 28b52ffd 2003190000 010fe1 60",
    "0202 0100 06000000 0103 1b000000 802000408000 "
    "400c000000 28b52ffd 2003190000 900010 02000000 05000000 0030",
    "0202 0100 06000000 0104 1f000000 802000408000 "
    "400b000000 28b52ffd 2002110000 2500 01000000 02000000 05000000 c00030",
]


@pytest.mark.parametrize("stored", PLANES)
def test_planes_are_read_as_the_format_document_says(stored: str, repository: Path):
    assert bytes(decode(Codec.PLANES, bytes.fromhex(stored), 12)) == NUMBERS.tobytes()
    assert stored in (repository / "docs" / "format.md").read_text(encoding="utf-8")


TABLE = (
    "0100000000000000 0000000000000000\n    01000000 02000000 4000000000000000 efcdab8967452301 "
    "000102030405060708090a0b0c0d0e0f 64000000 ffffffff 01 01 000000000000\n    "
    "0800000000000000 1000000000000000\n"
)


def test_a_table_is_as_in_the_format_document(repository: Path):
    mark = 0x0123456789ABCDEF
    chunk = ChunkRecord(1, Box((8,), (16,)), Codec.ZSTD, 2, 64, 100, bytes(range(16)), mark)
    assert encode_table([chunk]) == bytes.fromhex(TABLE)
    assert list(decode_table(memoryview(bytes.fromhex(TABLE)), "")) == [chunk]
    assert TABLE in (repository / "docs" / "format.md").read_text(encoding="utf-8")


def test_planes_that_the_writer_makes_are_read_by_the_book():
    bits = np.random.default_rng(0).standard_normal(3000).astype(np.float32).view(np.uint32)
    codec, stored = encode(Codec.PLANES, bits.tobytes(), dtype="float32")
    assert codec is Codec.PLANES
    view = memoryview(stored)
    assert view[:8].hex() == "0403" + "0200" + (2 * bits.size).to_bytes(4, "little").hex()
    low = np.frombuffer(view[20 : 20 + 2 * bits.size], "<u2")
    assert (low == bits & 0xFFFF).all()
