"""An export is proved before anyone can see it; one that comes out wrong never appears."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

import checkpoint
from checkpoint.errors import CheckpointError, Incomplete, Mismatch, NotFound
from checkpoint.format.codec import encode
from checkpoint.format.pack import PackBuilder
from checkpoint.interop import draft
from checkpoint.interop.conversion.contract import unheard
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.formats.known import FORMATS
from checkpoint.interop.place import Place
from tests.conversion_samples import save_state

BIG = 4096


@pytest.fixture
def source(tmp_path) -> str:
    url = str(tmp_path / "store")
    save_state(checkpoint.open_store(url), {"model": {"w": torch.randn(BIG), "b": torch.randn(7)}})
    return url


@pytest.fixture(params=["here", "behind a URL"])
def target(request, tmp_path) -> Iterator[str]:
    if request.param == "here":
        yield str(tmp_path / "exports" / "out")
        return
    yield f"memory://{(name := uuid.uuid4().hex)}/out"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{name}"):
        memory.rm(f"/{name}", recursive=True)


@pytest.fixture
def damaged(monkeypatch) -> None:
    """Flip a bit of every large block on its way into a file."""
    write = draft._Written.write

    def write_damaged(file, data):
        data = bytearray(data)
        if len(data) == 4 * BIG:
            data[len(data) // 2] ^= 1
        return write(file, bytes(data))

    monkeypatch.setattr(draft._Written, "write", write_damaged)


def export(source: str, target: str, format: str = "hf", listener=unheard) -> checkpoint.ConversionReport:
    return export_foreign(Whereabouts(source), target, Emigration(format), listener=listener)


@pytest.mark.parametrize("format", ["hf", "dcp", "torch", "megatron-dist", "deepspeed-universal"])
def test_an_export_that_is_damaged_on_the_way_never_appears_and_leaves_nothing(
    source, target, format, damaged, monkeypatch
):
    with pytest.raises(Mismatch, match=r"not left there.*model/w"):
        export(source, target, format)
    with pytest.raises(NotFound):
        _ = Place(target).files
    if "://" not in target:
        assert list(Path(target).parent.iterdir()) == []
    monkeypatch.undo()
    assert len(export(source, target, format).proofs) == 2
    assert FORMATS[format].looks_like(Place(target).files)


def test_an_export_that_cannot_even_be_opened_never_appears(source, target, monkeypatch):
    write = draft._Written.write
    monkeypatch.setattr(draft._Written, "write", lambda file, data: write(file, bytes(data)[::-1]))
    with pytest.raises(CheckpointError):
        export(source, target)
    with pytest.raises(NotFound):
        _ = Place(target).files


def test_while_an_export_is_proved_no_reader_believes_it(source, target):
    seen = []

    def listen(progress):
        if progress.what == "proving":
            with pytest.raises((NotFound, Incomplete)) as refused:
                _ = Place(target).files
            seen.append(refused)

    export(source, target, listener=listen)
    assert seen and Place(target).files


@pytest.mark.parametrize("how", ["reshard", "import"])
@pytest.mark.parametrize("where", ["in memory, once it was fingerprinted", "on its way to the store"])
def test_what_is_stored_is_read_back_before_it_is_committed(source, tmp_path, monkeypatch, how, where):
    torch.save({"model": {"w": torch.randn(BIG), "b": torch.randn(7)}}, tmp_path / "saved.pt")
    target = checkpoint.open_store(str(tmp_path / "target"))

    def convert() -> checkpoint.ConversionReport:
        if how == "reshard":
            return checkpoint.reshard(checkpoint.open_store(source), target, checkpoint.Change("shard=2"))
        return checkpoint.import_foreign(str(tmp_path / "saved.pt"), target, checkpoint.Adoption())

    seal_parts = PackBuilder.seal_parts

    def flipped(data):
        flipped = bytearray(data)
        flipped[len(flipped) // 2] ^= 1
        return bytes(flipped)

    with monkeypatch.context() as patched:
        if where.startswith("in memory"):
            patched.setattr(
                "checkpoint.interop.conversion.writing.encode",
                lambda codec, raw, *rest, **named: encode(codec, flipped(raw), *rest, **named),
            )
        else:
            patched.setattr(
                PackBuilder,
                "seal_parts",
                lambda builder, tensors: [flipped(part) for part in seal_parts(builder, tensors)],
            )
        with pytest.raises(Mismatch, match=r"read back, the content of \['model/"):
            convert()
    assert not checkpoint.Catalog(target).steps()
    assert not target.list("packs/")
    assert len(convert().proofs) == 2
