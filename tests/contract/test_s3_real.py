"""The contract on a real S3 server with both clients, and what it is like when its gateway dies or hangs."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import boto3  # type: ignore[import-untyped]  # it has no types
import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]  # it has no types

from checkpoint.errors import AlreadyExists, StoreUnavailable
from checkpoint.store import objects
from checkpoint.store.contract import Store
from checkpoint.store.objects import ObjectStore
from checkpoint.store.open import probe
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.contract.s3_suite import BUCKET, S3Contract, client, served
from tests.contract.suite import KEY, NUM_WRITERS
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

SOON = RetryPolicy(deadline_s=30.0, first_wait_s=0.01, longest_wait_s=0.1)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[S3Server]:
    with served() as server:
        yield server


@pytest.fixture(scope="class")
def clients(request: pytest.FixtureRequest) -> tuple[Store, Store]:
    return client(request.cls.scheme), client(request.cls.scheme)


class TestS3fs(S3Contract):
    scheme = "s3"


class TestObstore(S3Contract):
    scheme = "obstore+s3"


@pytest.mark.parametrize("versioning", ["Suspended", "Enabled"])
def test_a_probe_tells_the_truth_about_a_bucket(versioning: str):
    """Some servers ignore the condition where versions are kept: hence the probe, instead of trust."""
    client = boto3.session.Session().client("s3")
    bucket = f"hf-versions-{versioning.lower()}"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": versioning})
    client.put_object(Bucket=bucket, Key="there", Body=b"first")
    with suppress(ClientError):
        client.put_object(Bucket=bucket, Key="there", Body=b"second", IfNoneMatch="*")
    is_conditional = client.get_object(Bucket=bucket, Key="there")["Body"].read() == b"first"
    found = probe(ObjectStore(f"s3://{bucket}/run"))
    assert (found.is_writable, found.is_readable, found.is_conditional) == (True, True, is_conditional)
    assert ("let one host write" in found.problem) == (not is_conditional)


def test_requests_outlast_a_gateway_that_dies_and_comes_back(server: S3Server, quiet_retries):
    num_asked = 0

    def restart_at_the_third() -> bool:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            server.start_gateway()
        return True

    store = Retrying(ObjectStore(f"s3://{BUCKET}/outage"), SOON, may_go_on=restart_at_the_third)
    store.put("before", b"abc")
    server.kill_gateway()
    store.put_new(KEY, b"during")
    assert num_asked >= 3
    assert [bytes(store.read(key)[0]) for key in ("before", KEY)] == [b"abc", b"during"]


def test_of_many_writers_that_wait_out_an_outage_exactly_one_is_admitted(server: S3Server, quiet_retries):
    plain = ObjectStore(f"s3://{BUCKET}/race")
    plain.put("before", b"")
    all_asked = threading.Barrier(NUM_WRITERS, action=server.start_gateway)
    has_asked = threading.local()

    def restart_when_all_have_asked() -> bool:
        if not getattr(has_asked, "once", False):
            has_asked.once = True
            all_asked.wait()
        return True

    def write(writer: int) -> bool:
        try:
            Retrying(plain, SOON, may_go_on=restart_when_all_have_asked).put_new(KEY, b"%d" % writer)
        except AlreadyExists:
            return False
        return True

    server.kill_gateway()
    with ThreadPoolExecutor(NUM_WRITERS) as writers:
        won = list(writers.map(write, range(NUM_WRITERS)))
    assert won.count(True) == 1
    assert bytes(plain.read(KEY)[0]) == b"%d" % won.index(True)


def test_a_gateway_that_hangs_is_given_up_and_asked_again(server: S3Server, quiet_retries, monkeypatch):
    url = f"s3://{BUCKET}/hung"
    ObjectStore(url).put("before", b"abc")
    monkeypatch.setattr(objects, "_S3_READ_TIMEOUT_S", 1)
    hung = ObjectStore(url)

    def resume() -> bool:
        server.resume_gateway()
        return True

    server.suspend_gateway()
    try:
        with pytest.raises(StoreUnavailable):
            hung.read("before")
        # The first request lies in the gateway's ear: it may be carried out after the second one.
        Retrying(hung, SOON, may_go_on=resume).put_new(KEY, b"once")
    finally:
        server.resume_gateway()
    monkeypatch.undo()
    found = ObjectStore(url)
    assert [bytes(found.read(key)[0]) for key in ("before", KEY)] == [b"abc", b"once"]
    assert [entry.key for entry in found.list("")] == ["before", KEY]
