"""What a store on S3 promises beyond the contract, whoever the client and the server are."""

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import boto3  # type: ignore[import-untyped]  # it has no types
import pytest

from checkpoint.errors import AlreadyExists, StoreError
from checkpoint.store.contract import Store
from checkpoint.store.objects import ObjectStore
from checkpoint.store.obstore import ObStore
from checkpoint.store.open import open_store
from tests.contract.suite import KEY, StoreContract
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, missing_programs

BUCKET = "hf-test"


@contextmanager
def credentials(endpoint: str, access_key: str, secret_key: str) -> Iterator[str]:
    """Have a server's endpoint and keys in the environment, as a user would, and a bucket on it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", access_key)
        environment.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint


@contextmanager
def served() -> Iterator[S3Server]:
    """Run a real server for some tests, and have the environment speak of it; skip where there is none."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)} on this machine: install the packages of deploy/apt.txt")
    server = S3Server()
    try:
        server.start()
        with credentials(server.endpoint, ACCESS_KEY, SECRET_KEY):
            yield server
    finally:
        server.stop()


def client(scheme: str) -> Store:
    """Return a new client of one place in the bucket; without the optional one, skip the test and say why."""
    if scheme == "s3":
        return ObjectStore(f"s3://{BUCKET}/runs/one")
    pytest.importorskip("obstore", reason="the optional client is not installed: pip install '.[obstore]'")
    return ObStore(f"{scheme}://{BUCKET}/runs/two")


class S3Contract(StoreContract):
    """Inherit this with a `scheme` and a fixture `clients` of class scope: two clients of it."""

    scheme = "s3"

    @pytest.fixture
    def store(self, clients: tuple[Store, Store]) -> Store:
        store = clients[0]
        for entry in store.list(""):
            store.delete(entry.key)
        return store

    @pytest.fixture
    def other(self, clients: tuple[Store, Store]) -> Store:
        return clients[1]

    def test_a_large_value_goes_and_comes_in_parts(self, store: Store):
        data = os.urandom(1 << 20) * 33
        store.put(KEY, data)
        assert bytes(store.read(KEY)[0]) == data
        store.put(KEY, [memoryview(data)[: 5 << 20], memoryview(data)[5 << 20 :]])
        assert bytes(store.read(KEY)[0]) == data

    def test_a_large_value_does_not_replace_another(self, store: Store):
        data = os.urandom(1 << 20) * 33
        store.put_new(KEY, data)
        with pytest.raises(AlreadyExists):
            store.put_new(KEY, bytes(len(data)))
        assert bytes(store.read(KEY)[0]) == data

    def test_a_listing_goes_on_after_the_first_thousand(self, other: Store):
        store = open_store(f"{other}-many")
        keys = [f"packs/{number:06d}" for number in range(1010)]
        with ThreadPoolExecutor(8) as writers:
            list(writers.map(lambda key: store.put(key, b""), keys))
        assert [entry.key for entry in store.list("packs/")] == keys

    def test_a_pickled_store_carries_its_url_and_nothing_else(self, store: Store):
        store.put(KEY, b"abc")
        pickled = pickle.dumps(store)
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in pickled
        assert bytes(pickle.loads(pickled).read(KEY)[0]) == b"abc"

    def test_a_bucket_that_does_not_exist_is_refused_at_once(self, store: Store):
        missing = open_store(f"{self.scheme}://hf-nobody-made-this/run")
        for use in (
            lambda: missing.list(""),
            lambda: missing.put(KEY, b""),
            lambda: missing.put_new(KEY, b""),
            lambda: missing.read(KEY),
        ):
            with pytest.raises(StoreError, match="hf-nobody-made-this") as caught:
                use()
            assert "check the URL, the bucket" in str(caught.value)
