"""Golden files: a checkpoint of every manifest version that there ever was still reads, to the last bit."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint.engine.catalog import Catalog
from checkpoint.format.codec import Codec, checksum, decode
from checkpoint.format.dtypes import dtype_of, itemsize
from checkpoint.format.fingerprint import fingerprint
from checkpoint.format.layout import Box
from checkpoint.format.manifest import chunks_of_page, encode_manifest, encode_page
from checkpoint.format.pack import TRAILER_BYTES, decode_pack_index, index_range
from checkpoint.lifecycle.scrub import verify
from checkpoint.store.contract import ByteRange
from checkpoint.store.local import LocalStore
from tests.format_samples import Bits, sample_tensors

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def store(tmp_path) -> LocalStore:
    """A copy of the golden store of version 0."""
    return LocalStore(shutil.copytree(GOLDEN / "manifest_v0", tmp_path / "store"))


def test_version_0_still_reads_to_the_last_bit(store):
    manifest = Catalog(store).manifest(5)
    assert (manifest.version, manifest.run, manifest.generation, manifest.token) == (0, "sample", 1, "token")
    assert manifest.skeleton == {name: {"$": "tensor", "name": name} for name in sample_tensors()}
    found: dict[str, Bits] = {
        tensor.name: np.zeros(tensor.shape, dtype_of(tensor.dtype).carrier) for tensor in manifest.tensors
    }
    codecs = set()
    for page in manifest.pages:
        for chunk in chunks_of_page(manifest, page, store.read(page.key)[0]):
            tensor = manifest.tensors[chunk.tensor]
            (stored,) = store.read(manifest.packs[chunk.pack].key, [ByteRange(chunk.offset, chunk.num_bytes)])
            raw = decode(chunk.codec, stored, chunk.box.numel * itemsize(tensor.dtype))
            target = found[tensor.name]
            target[chunk.box.within(Box.whole(tensor.shape))] = np.frombuffer(raw, target.dtype).reshape(
                chunk.box.size
            )
            codecs.add(chunk.codec)
    assert codecs == {Codec.RAW, Codec.ZSTD}
    for name, (_, bits) in sample_tensors(5).items():
        assert (found[name] == bits).all()


def test_version_0_is_sound_and_written_as_it_was(store):
    report = verify(store)
    assert (report.is_sound, report.num_chunks) == (True, 10)
    for step in report.steps:
        manifest = Catalog(store).manifest(step)
        page = store.read(manifest.pages[0].key)[0]
        assert encode_page(chunks_of_page(manifest, manifest.pages[0], page)) == bytes(page)
        assert encode_manifest(manifest) == bytes(store.read(f"manifests/{step:012d}")[0])
        pack = store.read(manifest.packs[0].key)[0]
        offset, length = index_range(pack[-TRAILER_BYTES:], len(pack), "golden")
        assert len(decode_pack_index(pack[offset : offset + length], len(pack)).chunks) == 5


def test_the_golden_files_are_the_ones_that_were_released():
    digests = {
        path.relative_to(GOLDEN).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((GOLDEN / "manifest_v0").rglob("*"))
        if path.is_file()
    }
    assert digests == json.loads((GOLDEN / "manifest_v0.json").read_text())


VECTORS = [
    ("float32", (4,), Box((0,), (4,)), bytes(range(16)), 0xA40925021B84A070),
    ("float32", (4096, 2), Box((2048, 0), (1, 2)), bytes(range(8)), 0x2B5D49A03E793ABC),
    ("bfloat16", (5000,), Box((4095,), (2,)), bytes(range(4)), 0x2888058E93BB8752),
    ("uint8", (3, 3), Box((1, 1), (2, 2)), bytes([1, 2, 3, 4]), 0x0765C9571EB2BDFE),
    ("complex128", (), Box((), ()), bytes(range(16)), 0xA40925021B84A070),
]


@pytest.mark.parametrize(("dtype", "shape", "box", "raw", "expected"), VECTORS)
def test_fingerprints_are_those_of_the_format_document(dtype, shape, box, raw, expected, repository: Path):
    assert fingerprint(raw, dtype, shape, box) == expected
    assert f"{expected:016x}" in (repository / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_checksum_is_that_of_the_format_document(repository: Path):
    digest = checksum(bytes(range(16))).hex()
    assert digest in (repository / "docs" / "format.md").read_text(encoding="utf-8")
