"""What stands around a store: retries end, lost answers are understood, counts are right, faults strike."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.errors import AlreadyExists, NotFound, StoreRefused, StoreUnavailable
from checkpoint.store.contract import ByteRange
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from checkpoint.store.wrappers import Retrying, RetryPolicy
from tests.wrapped_stores import Fault, Faulty, Full, Lost, Metered, Short, Slow, Unanswered

pytestmark = pytest.mark.usefixtures("quiet_retries")

SOON = RetryPolicy(deadline_s=0.5, first_wait_s=0.001, longest_wait_s=0.002)


@pytest.mark.parametrize("verb", ["put_new", "put", "read", "list", "delete"])
@pytest.mark.parametrize("fault", [Lost, Unanswered])
def test_a_request_that_fails_twice_is_made_a_third_time(verb, fault):
    inner = MemoryStore()
    if verb in ("read", "list", "delete"):
        inner.put("k", b"abc")
    store = Retrying(Faulty(inner, [fault(verb, 1), fault(verb, 2)]), SOON)
    uses = {
        "put_new": lambda: store.put_new("k", b"abc"),
        "put": lambda: store.put("k", b"abc"),
        "read": lambda: store.read("k")[0],
        "list": lambda: [entry.key for entry in store.list("")],
        "delete": lambda: store.delete("k"),
    }
    assert uses[verb]() in (None, b"abc", ["k"])
    assert [entry.key for entry in inner.list("")] == ([] if verb == "delete" else ["k"])


def test_a_lost_answer_does_not_hide_that_somebody_else_was_first():
    inner = MemoryStore()
    inner.put("k", b"theirs")
    with pytest.raises(AlreadyExists):
        Retrying(Faulty(inner, [Lost("put_new", 1)]), SOON).put_new("k", b"ours")
    assert inner.read("k") == [b"theirs"]


def test_a_store_that_stays_away_is_given_up_at_the_deadline():
    metered = Metered(Faulty(MemoryStore(), [Lost("list", n) for n in range(1, 10_000)]))
    with pytest.raises(StoreUnavailable, match="on purpose"):
        Retrying(metered, RetryPolicy(0.05, 0.001, 0.002)).list("")
    assert metered.traffic().num_calls["list"] > 2


def test_a_request_that_nobody_wants_any_more_at_the_end_of_a_wait_is_not_made_again():
    inner = MemoryStore()
    is_wanted = iter([True, False, False])
    store = Retrying(Faulty(inner, [Lost("put_new", 1)]), SOON, may_go_on=lambda: next(is_wanted))
    with pytest.raises(StoreUnavailable, match="on purpose"):
        store.put_new("k", b"abc")
    assert inner.list("") == []


class Refusing(MemoryStore):
    """A store without permissions."""

    def put(self, key, data):
        raise StoreRefused("no permission")


def test_what_no_retry_can_mend_is_not_tried_again():
    metered = Metered(Refusing())
    store = Retrying(metered, SOON)
    with pytest.raises(StoreRefused):
        store.put("k", b"")
    with pytest.raises(NotFound):
        store.read("k")
    store.put_new("k", b"")
    with pytest.raises(AlreadyExists):
        store.put_new("k", b"")
    assert metered.traffic().num_calls == {"put": 1, "read": 1, "put_new": 2}


def test_traffic_is_counted_by_verb():
    store = Metered(MemoryStore())
    store.put("a", b"12345")
    store.put_new("b", bytearray(3))
    store.read("a", [ByteRange(0, 2), ByteRange(1, 1)])
    store.read("a")
    store.list("")
    store.delete("a")
    traffic = store.traffic()
    assert traffic.num_calls == {"put": 1, "put_new": 1, "read": 2, "list": 1, "delete": 1}
    assert traffic.num_bytes == {"put": 5, "put_new": 3, "read": 8}


def test_faults_strike_where_they_are_told_to():
    slept: list[float] = []
    faults: list[Fault] = [Lost("put", 1), Unanswered("put", 2), Short(2), Slow("list", 1.5)]
    inner = MemoryStore()
    store = Faulty(inner, faults, sleep=slept.append)
    with pytest.raises(StoreUnavailable):
        store.put("k", b"lost")
    assert inner.list("") == []
    with pytest.raises(StoreUnavailable):
        store.put("k", b"unanswered")
    assert inner.read("k") == [b"unanswered"]
    assert [bytes(store.read("k")[0]), bytes(store.read("k")[0])] == [b"unanswered", b"unanswere"]
    store.list("")
    assert slept == [1.5]


def test_writes_of_both_kinds_can_be_counted_together():
    inner = MemoryStore()
    store = Faulty(inner, [Lost("write", 2), Unanswered("write", 4)])
    store.put_new("a", b"")
    store.list("")
    with pytest.raises(StoreUnavailable, match="put number 1 was lost"):
        store.put("b", b"")
    store.put("b", b"")
    with pytest.raises(StoreUnavailable, match="answer to put_new number 2"):
        store.put_new("c", b"")
    assert [entry.key for entry in inner.list("")] == ["a", "b", "c"]


def test_a_full_store_refuses_what_does_not_fit_and_keeps_what_it_has():
    inner = MemoryStore()
    store = Faulty(inner, [Full(10)])
    store.put_new("a", [b"123", b"45"])
    with pytest.raises(StoreRefused, match="no space left"):
        store.put("b", b"123456")
    store.put("b", b"12345")
    with pytest.raises(StoreRefused, match="no space left"):
        store.put_new("c", b"1")
    assert [(entry.key, entry.num_bytes) for entry in inner.list("")] == [("a", 5), ("b", 5)]
    assert bytes(store.read("a")[0]) == b"12345"


_WRITE_UNTIL_DEATH = """
import sys
sys.path.insert(0, {root!r})
from checkpoint.store.local import LocalStore
from tests.wrapped_stores import Death, Faulty
store = Faulty(LocalStore({store!r}), [Death("put_new", 3)])
for number in range(5):
    store.put_new(f"packs/{{number}}", b"abc")
"""


@pytest.mark.slow
def test_a_process_dies_at_the_write_it_is_told_to(tmp_path, repository: Path):
    script = _WRITE_UNTIL_DEATH.format(root=str(repository), store=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [entry.key for entry in LocalStore(tmp_path).list("")] == ["packs/0", "packs/1"]
