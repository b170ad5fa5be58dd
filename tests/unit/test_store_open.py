"""URLs find their stores, bad ones are refused by name, and a probe tells what a store cannot do."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.errors import AlreadyExists, StoreError, StoreRefused, StoreUnavailable
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from checkpoint.store.objects import ObjectStore
from checkpoint.store.obstore import ObStore
from checkpoint.store.open import open_store, probe
from tests.wrapped_stores import Faulty, Lost


def test_a_path_and_its_url_name_the_same_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("runs/a b").put("k", b"abc")
    for url in (
        str(tmp_path / "runs/a b"),
        f"file://{tmp_path}/runs/a%20b",
        f"file://localhost{tmp_path}/runs/a b",
    ):
        store = open_store(url)
        assert str(store) == f"file://{tmp_path}/runs/a b"
        assert bytes(store.read("k")[0]) == b"abc"


def test_opening_and_listing_leave_no_trace(tmp_path):
    store = open_store(f"{tmp_path}/new/store")
    assert store.list("manifests/") == []
    assert list(tmp_path.iterdir()) == []


def test_memory_by_one_name_is_one_store():
    open_store("memory://one-name").put("k", b"abc")
    assert open_store("memory://one-name").read("k") == [b"abc"]
    assert open_store("memory://another-name").list("") == []


def test_other_urls_go_through_fsspec_and_are_tried_again():
    assert str(open_store("s3://bucket/prefix/")) == "s3://bucket/prefix"


@pytest.mark.parametrize(
    "url",
    ["", "://x", "file://some-host/path", "s3://key:secret@bucket/x", "obstore+s3://key:secret@bucket/x"],
)
def test_a_url_that_names_no_store_is_refused(url: str):
    with pytest.raises(StoreRefused) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host/runs", "HTTPS://host/runs", "zip://a.zip"])
def test_what_can_only_be_read_is_refused_when_it_is_opened_and_not_after_a_minute_of_trying(url: str):
    with pytest.raises(StoreRefused, match=r"nothing can be written through (?i:https?|zip)://; give a path"):
        open_store(url)


def test_obstore_is_used_where_the_url_says_so():
    store = open_store("obstore+s3://bucket/prefix/")
    assert str(store) == "obstore+s3://bucket/prefix"
    assert str(pickle.loads(pickle.dumps(ObStore(str(store))))) == str(store)
    with pytest.raises(StoreRefused, match=r"write obstore\+s3://bucket/prefix"):
        open_store("obstore+nonsense://bucket")


def test_without_the_optional_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreRefused, match=r"pip install 'holdfast\[obstore\]'"):
        open_store("obstore+s3://bucket/prefix").list("")


def test_a_protocol_that_nobody_knows_is_refused_with_a_remedy():
    with pytest.raises(StoreRefused, match=r"nonsense://x.*check the URL"):
        open_store("nonsense://x/y").list("")


def test_a_store_that_cannot_be_written_says_where_and_what_to_do(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = open_store(f"{tmp_path}/file/store")
    for use in (lambda: store.put("k", b""), lambda: store.put_new("k", b"")):
        with pytest.raises(StoreRefused, match=r"file/store.*check the path, its permissions"):
            use()
    with pytest.raises(StoreUnavailable, match=r"/file is a file, and a store is a directory"):
        open_store(f"{tmp_path}/file").list("")


def test_a_store_survives_pickling_as_what_it_names(tmp_path):
    for store in (LocalStore(tmp_path), ObjectStore("s3://bucket/x")):
        assert str(pickle.loads(pickle.dumps(store))) == str(store)


class Overwriting(MemoryStore):
    """A store that ignores the condition, as some S3 gateways do."""

    def put_new(self, key, data):
        self.put(key, data)


class Forgetful(MemoryStore):
    """A store whose listings lag behind."""

    def list(self, prefix):
        return []


def test_a_probe_tells_what_a_store_cannot_do(tmp_path):
    ignoring = probe(Overwriting())
    assert (ignoring.is_writable, ignoring.is_readable, ignoring.is_conditional) == (True, True, False)
    assert "put_new" in ignoring.problem
    lagging = probe(Forgetful())
    assert (lagging.is_writable, lagging.is_readable) == (True, False)
    assert "consistent" in lagging.problem
    (tmp_path / "file").write_text("")
    broken = probe(open_store(f"{tmp_path}/file/store"))
    assert (broken.is_writable, broken.is_readable, broken.is_conditional) == (False, False, False)
    assert "check the path" in broken.problem
    assert "on purpose" in probe(Faulty(MemoryStore(), [Lost("read", 2)])).problem


_KILLED_WRITER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from checkpoint.store import local
store = local.LocalStore({store!r})
store.put_new("packs/whole", b"x" * 100)
written = local.write_parts
def die(descriptor, data):
    written(descriptor, [data[0][:50]])
    os.kill(os.getpid(), signal.SIGKILL)
local.write_parts = die
store.{verb}("packs/torn", b"y" * 100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["put", "put_new"])
def test_a_writer_killed_in_the_middle_leaves_nothing_that_a_reader_sees(
    tmp_path, repository: Path, verb: str
):
    script = _KILLED_WRITER.format(root=str(repository), store=str(tmp_path), verb=verb)
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -9
    store = LocalStore(tmp_path)
    assert [entry.key for entry in store.list("")] == ["packs/whole"]
    assert len(list((tmp_path / ".incoming").iterdir())) == 1
    store.put_new("packs/torn", b"again")


def test_what_a_crash_left_long_ago_is_swept_by_the_next_writer(tmp_path):
    incoming = tmp_path / ".incoming"
    incoming.mkdir()
    for name, age_s in (("old", 25 * 3600), ("new", 3600)):
        (incoming / name).write_bytes(b"half")
        os.utime(incoming / name, (time.time() - age_s,) * 2)
    LocalStore(tmp_path).put("k", b"abc")
    assert [path.name for path in incoming.iterdir()] == ["new"]


def test_a_directory_in_the_way_of_a_key_is_an_error_and_not_a_loss(tmp_path):
    store = LocalStore(tmp_path)
    store.put("a/b", b"abc")
    with pytest.raises(AlreadyExists):
        store.put_new("a", b"")
    with pytest.raises(StoreError):
        store.put("a", b"")
    assert store.read("a/b") == [b"abc"]
