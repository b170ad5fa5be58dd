"""The contract, on memory, a directory, what fsspec makes of both, and on every wrapper."""

import uuid

import pytest

from checkpoint.errors import NotFound
from checkpoint.store.contract import Store
from checkpoint.store.memory import MemoryStore
from checkpoint.store.objects import ObjectStore
from checkpoint.store.open import open_store
from checkpoint.store.wrappers import Retrying
from tests.contract.suite import StoreContract
from tests.wrapped_stores import Faulty, Metered


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path) -> Store:
        return open_store(str(tmp_path / "run" / "store"))

    @pytest.fixture
    def other(self, tmp_path) -> Store:
        return open_store(f"file://{tmp_path}/run/store")

    def test_it_reads_into_memory_of_the_callers_and_tells_what_is_too_short(self, store):
        store.put_new("a/b", bytes(range(200)))
        memory = bytearray(50)
        store.read_into("a/b", 100, [memoryview(memory)[:20], memoryview(memory)[20:]])
        assert bytes(memory) == bytes(range(100, 150))
        with pytest.raises(NotFound):
            store.read_into("a/b", 151, [memoryview(memory)])
        with pytest.raises(NotFound):
            store.read_into("a/c", 0, [memoryview(memory)])


class TestFsspecFiles(StoreContract):
    @pytest.fixture
    def store(self, tmp_path) -> Store:
        return ObjectStore(f"file://{tmp_path}/store")

    @pytest.fixture
    def other(self, tmp_path) -> Store:
        return ObjectStore(f"file://{tmp_path}/store")


class TestFsspecMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return ObjectStore(f"memory://{uuid.uuid4().hex}/store")

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return ObjectStore(str(store))


class TestRetrying(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Retrying(MemoryStore())

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


class TestMetered(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Metered(MemoryStore())

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


class TestFaultyWithoutFaults(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Faulty(MemoryStore(), [])

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


def test_the_root_that_a_client_lists_while_the_first_value_is_put_is_no_key(monkeypatch):
    store = ObjectStore(f"memory://{uuid.uuid4().hex}/store")
    root = store._fs()._strip_protocol(str(store))
    # As s3fs does: it finds nothing below the root, asks what the root is, and by then it is a folder.
    monkeypatch.setattr(store._fs(), "find", lambda *_, **__: {root: {"type": "directory", "size": 0}})
    assert store.list("") == []
