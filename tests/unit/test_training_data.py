"""Text as bytes: which documents are found, how they are split, and that windows are what the files say."""

import math
import sysconfig
from pathlib import Path

import fsspec
import numpy as np
import pytest

from elastic.errors import JobRejected
from elastic.training.data import open_corpus, unigram_entropy


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for index in range(60):
        path = root / f"part{index % 3}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * (index * 7))
    return root


def test_every_document_is_in_exactly_one_split_wherever_the_directory_lies(texts, tmp_path):
    splits = {name: open_corpus(str(texts), name) for name in ("train", "validation")}
    names = [document.name for corpus in splits.values() for document in corpus.documents]
    assert sorted(names) == sorted(f"part{index % 3}/{index}.txt" for index in range(1, 60))
    moved = texts.rename(tmp_path / "elsewhere")
    assert open_corpus(str(moved), "train").digest == splits["train"].digest


def test_windows_run_over_the_documents_borders(texts):
    corpus = open_corpus(str(texts), "train")
    whole = b"".join(Path(document.path).read_bytes() for document in corpus.documents)
    assert corpus.num_bytes == len(whole)
    for offset, num_bytes in [(0, len(whole)), (5, 0), (0, 1), (len(whole) - 1, 1), (100, 777)]:
        assert corpus.window(offset, num_bytes).tobytes() == whole[offset : offset + num_bytes]
    with pytest.raises(ValueError, match="leaves a text"):
        corpus.window(len(whole) - 3, 4)


def test_a_single_file_keeps_its_last_tenth_for_validation(tmp_path):
    path = tmp_path / "one"
    path.write_bytes(bytes(range(100)))
    assert open_corpus(str(path), "train").window(0, 90).tobytes() == bytes(range(90))
    assert open_corpus(str(path), "validation").window(0, 10).tobytes() == bytes(range(90, 100))


def test_a_glob_and_a_url_name_the_same_text_as_the_directory(texts):
    plain = open_corpus(str(texts), "train")
    assert open_corpus(f"{texts}/**/*.txt", "train").digest == plain.digest
    memory = fsspec.filesystem("memory")
    for document in (*plain.documents, *open_corpus(str(texts), "validation").documents):
        memory.pipe(f"/corpus/{document.name}", Path(document.path).read_bytes())
    remote = open_corpus("memory://corpus", "train")
    assert {each.name for each in remote.documents} == {each.name for each in plain.documents}
    for document in remote.documents[:3]:
        assert remote.window(0, document.num_bytes).size == document.num_bytes
    assert sorted(remote.window(0, remote.num_bytes)) == sorted(plain.window(0, plain.num_bytes))


def test_the_standard_library_is_found_without_its_tests_and_installed_packages():
    names = [document.name for document in open_corpus("stdlib", "train").documents]
    assert Path(sysconfig.get_path("stdlib"), "argparse.py").exists()
    assert len(names) > 300
    assert not [
        name for name in names if "site-packages" in name or name.startswith("test/") or "/test" in name
    ]


@pytest.mark.parametrize("content", [None, b""])
def test_no_text_is_an_error_that_names_the_source(tmp_path, content):
    path = tmp_path / "absent"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JobRejected, match="absent"):
        open_corpus(str(path), "train")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "shrinking"
    path.write_bytes(b"x" * 100)
    corpus = open_corpus(str(path), "train")
    path.write_bytes(b"x" * 10)
    with pytest.raises(JobRejected, match="shrinking shrank"):
        corpus.window(0, 50)


def test_the_entropy_of_single_bytes_is_that_of_their_frequencies(tmp_path):
    path = tmp_path / "even"
    path.write_bytes(np.tile(np.arange(16, dtype=np.uint8), 1000).tobytes())
    assert unigram_entropy(open_corpus(str(path), "train")) == pytest.approx(math.log(16), abs=1e-3)
