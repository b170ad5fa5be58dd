"""The contract on an emulated S3 server, with both clients."""

import time
from collections.abc import Iterator

import pytest

from checkpoint.errors import StoreRefused, StoreUnavailable
from checkpoint.store.contract import Store
from tests.contract.s3_suite import BUCKET, S3Contract, client, credentials
from tests.contract.suite import KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with credentials(f"http://{host}:{port}", "holdfast-test", "not-a-secret"):
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="class")
def clients(request: pytest.FixtureRequest) -> tuple[Store, Store]:
    return client(request.cls.scheme), client(request.cls.scheme)


class TestS3fs(S3Contract):
    scheme = "s3"


class TestObstore(S3Contract):
    scheme = "obstore+s3"


@pytest.mark.parametrize("scheme", ["s3", "obstore+s3"])
def test_a_server_that_is_away_is_unavailable_soon(scheme: str, monkeypatch):
    store = client(scheme)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    began_s = time.monotonic()
    for use in (lambda: store.read(KEY), lambda: store.put_new(KEY, b""), lambda: store.list("")):
        with pytest.raises(StoreUnavailable, match=f"s3://{BUCKET}/run") as caught:
            use()
        assert not isinstance(caught.value, StoreRefused)
    assert time.monotonic() - began_s < 5
