"""The contract, on memory, a directory, what fsspec makes of both, and on every wrapper."""

import uuid
from typing import get_args

import pytest

from checkpoint.errors import NotFound, StoreRefused, StoreUnavailable
from checkpoint.store.contract import Store
from checkpoint.store.memory import MemoryStore
from checkpoint.store.objects import ObjectStore
from checkpoint.store.open import open_store
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.contract.suite import StoreContract
from tests.wrapped_stores import Faulty, Full, Lost, Metered, Slow, Unanswered, Verb


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


class TestRetryingOverAStoreThatFails(StoreContract):
    """Every third request is lost, of every fifth the answer: who tries again keeps the whole contract."""

    @pytest.fixture
    def store(self, quiet_retries) -> Store:
        faults = [
            fault(verb, nth)
            for verb in get_args(Verb)
            for fault, every in ((Lost, 3), (Unanswered, 5))
            for nth in range(every, 3000, every)
        ]
        return Retrying(Faulty(MemoryStore(), faults), RetryPolicy(first_wait_s=1e-4, longest_wait_s=1e-3))

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


class TestAStoreThatIsSlowAndHasLittleRoom(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        slow = [Slow(verb, 1e-4) for verb in get_args(Verb)]
        return Faulty(MemoryStore(), [*slow, Full(1 << 30)])

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return store


@pytest.mark.parametrize("verb", ["put", "put_new"])
def test_what_does_not_fit_is_refused_once_and_for_all_and_leaves_nothing(verb):
    store = Retrying(Faulty(MemoryStore(), [Full(10)]), RetryPolicy(first_wait_s=1e-4))
    store.put("a", b"12345678")
    with pytest.raises(StoreRefused, match="no space left"):
        getattr(store, verb)("b", b"123")
    assert [entry.key for entry in store.list("")] == ["a"]


def test_who_has_tried_long_enough_tells_the_last_error(quiet_retries):
    silent = Faulty(MemoryStore(), [Lost("read", nth) for nth in range(1, 3000)])
    with pytest.raises(StoreUnavailable, match="on purpose"):
        Retrying(silent, RetryPolicy(deadline_s=0.05, first_wait_s=1e-3, longest_wait_s=1e-2)).read("a")


def test_the_root_that_a_client_lists_while_the_first_value_is_put_is_no_key(monkeypatch):
    store = ObjectStore(f"memory://{uuid.uuid4().hex}/store")
    root = store._fs()._strip_protocol(str(store))
    # As s3fs does: it finds nothing below the root, asks what the root is, and by then it is a folder.
    monkeypatch.setattr(store._fs(), "find", lambda *_, **__: {root: {"type": "directory", "size": 0}})
    assert store.list("") == []
