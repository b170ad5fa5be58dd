"""A byte that was damaged after a foreign file was written is not converted, where the file can tell."""

import io
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint.errors import Corrupt
from tests.conversion_samples import adam_state, bits_of, block_weights, save_state

WEIGHT, MOMENT = "model/h.1.attn.qkv.weight", "optimizer/state/h.0.attn.qkv.weight/exp_avg"
CASES = [
    *((format, name) for format in ("torch", "dcp", "megatron-dist") for name in (WEIGHT, MOMENT)),
    ("deepspeed-universal", MOMENT),  # a damaged weight is seen to be no rounded master
    ("megatron", WEIGHT),  # which are written without optimizers
]


@pytest.fixture
def store(tmp_path):
    store = checkpoint.open_store(str(tmp_path / "store"))
    save_state(store, adam_state(block_weights()))
    return store


def flip(folder: Path, content: bytes) -> str:
    """Flip one bit in the middle of these bytes, wherever they are; return the file's name."""
    for path in sorted(folder.rglob("*")):
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        at = data.find(content)
        if at >= 0:
            data[at + len(content) // 2] ^= 4
            path.write_bytes(data)
            return path.name
    raise AssertionError("these bytes are nowhere")


@pytest.mark.parametrize(("format", "name"), CASES)
def test_no_conversion_takes_a_damaged_tensor(format, name, store, tmp_path):
    source = checkpoint.Whereabouts(str(store), 3)
    written, onward = tmp_path / "written", tmp_path / "onward"
    checkpoint.export_foreign(source, str(written), checkpoint.Emigration(format))
    target = checkpoint.open_store(str(tmp_path / "target"))
    file = flip(written, bits_of(store)[name][2])
    with pytest.raises(Corrupt, match=f"{file}.* was damaged after it was written"):
        checkpoint.import_foreign(str(written), target, checkpoint.Adoption())
    assert not checkpoint.Catalog(target).steps()
    damaged = checkpoint.Whereabouts(str(written))
    with pytest.raises(Corrupt, match="CRC-32"):
        checkpoint.export_foreign(damaged, str(onward), checkpoint.Emigration("torch"))
    assert not onward.exists()
    with pytest.raises(Corrupt, match="CRC-32"):
        checkpoint.compare_places(source, damaged)


def test_a_damaged_pickle_is_not_believed(tmp_path):
    torch.save({"model": {"first.weight": torch.ones(3, 3)}}, tmp_path / "saved.pt")
    flip(tmp_path, b"first.weight")
    with pytest.raises(Corrupt, match=r"the pickle of .*saved.pt was damaged"):
        checkpoint.look_at_foreign(str(tmp_path / "saved.pt"))


def test_files_without_checksums_are_read(tmp_path):
    weights = {"first.weight": torch.arange(9.0).reshape(3, 3)}
    buffer, was = io.BytesIO(), torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(weights, buffer)
    finally:
        torch.serialization.set_crc32_options(was)
    (tmp_path / "saved.pt").write_bytes(buffer.getvalue())
    store = checkpoint.open_store(str(tmp_path / "store"))
    checkpoint.import_foreign(str(tmp_path / "saved.pt"), store, checkpoint.Adoption())
    assert bits_of(store)["model/first.weight"][2] == weights["first.weight"].numpy().tobytes()
