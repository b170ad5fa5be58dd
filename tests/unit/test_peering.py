"""Keepers among each other, piece by piece: values in parts, proofs of a token, budgets, marks, shares."""

import gc
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import Checkpointer, LocalHost, Options, Parity
from checkpoint.engine.contract import OVERTAKEN, PARITY, Failed, Outcome
from checkpoint.errors import Corrupt, KeeperLost, PeerLost
from checkpoint.keeper.peering.dialing import TcpPeers
from checkpoint.keeper.peering.fragments import Fragments
from checkpoint.keeper.peering.handshake import admit, introduce, new_token
from checkpoint.keeper.peering.marks import Mark, mark_name, newest_order, older_than
from checkpoint.keeper.peering.policy import Address, PeerPolicy, parse_policy, policy_to_json
from checkpoint.keeper.peering.protector import Circle, Protector
from checkpoint.keeper.peering.shares import decode_head, encode_head, merge, share_of
from checkpoint.keeper.peering.shelf import Shelf
from checkpoint.redundancy import scratch
from checkpoint.redundancy.parts import Parts
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_shares import begin, handling, plan_of, rows_of


@given(st.lists(st.binary(max_size=9), max_size=6), st.data())
def test_a_value_in_parts_reads_like_the_whole(buffers, data):
    whole = b"".join(buffers)
    parts = Parts(buffers)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert parts.num_bytes == len(whole) and b"".join(parts) == whole
    assert bytes(parts.piece(start, stop)) == whole[start:stop]


def test_scratch_memory_is_lent_again_only_when_nobody_looks_at_it():
    first = scratch.scratch(1 << 20)
    view = memoryview(first.data)[7:9]
    first[7:9] = 5
    del first
    others = [scratch.scratch(1 << 20) for _ in range(20)]
    for other in others:
        other[:] = 9
    assert bytes(view) == b"\x05\x05"
    del view, others, other
    gc.collect()
    assert 0 < len(scratch._idle) <= scratch._MAX_IDLE


@pytest.mark.parametrize("is_known", [True, False])
def test_both_ends_of_a_connection_prove_that_they_know_the_token(is_known):
    token = new_token()
    server, client = socket.socketpair()

    def serve() -> None:
        with suppress(KeeperLost):
            admit(server, token)
        server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    if is_known:
        introduce(client, token)
    else:
        with pytest.raises(PeerLost):
            introduce(client, new_token())
    thread.join()
    client.close()


def test_fragments_stay_within_their_budget_and_give_room_back():
    fragments = Fragments(3000)
    fragments.put("a", [b"x" * 1000])
    fragments.put("a", [b"y" * 1000])
    fragments.put("b", [b"x" * 1000])
    with pytest.raises(PeerLost, match="budget_mib"):
        fragments.put("c", [b"x" * 1000])
    fragments.drop("b")
    fragments.put("c", [b"x" * 1000])
    assert fragments.keys("") == ["a", "c"] and fragments.most_bytes <= 3000


def test_marks_tell_the_newest_order_of_the_first_host_and_what_is_older():
    names = [
        mark_name((2, 9), Mark.ORDERED, "a"),
        mark_name((2, 10), Mark.ORDERED, "a"),
        mark_name((3, 1), Mark.ORDERED, "b"),
        "parity/000000000002.000000000009:0.1.2",
    ]
    assert newest_order(names, "a") == (2, 10)
    assert older_than(names, (2, 10)) == [names[0], names[3]]


def test_a_policy_survives_its_wire_and_an_address_keeps_its_token_to_itself():
    policy = PeerPolicy("10.0.0.1", "rack7", Parity(5, 2, every=3, budget_mib=64))
    assert parse_policy(policy_to_json(policy)) == policy
    assert "secret" not in repr(Address("10.0.0.1", 5, "secret"))


def test_parity_without_anything_held_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory"):
        Checkpointer(str(tmp_path / "store"), options=Options(parity=Parity()))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_snapshot_that_newer_ones_overtook_is_told_as_that_and_not_as_an_error(caplog):
    rows, fragments = rows_of(1), Fragments(1 << 20)
    with LocalHost(MemoryStore("h0"), "h0", arena_bytes=4 << 20, hold=1) as host:
        protector = Protector("h0", Shelf(host.intake), fragments)
        for step in (3, 4):
            host.seal(begin(host, step, rows, plan_of(rows, handling("memory"), hosts=("h0",))))
        until(lambda: [id_[1] for id_ in Shelf(host.intake).entries()] == [4])
        fragments.put(mark_name((0, 3), Mark.ORDERED, "h1"), [b""])
        protector.meet(Circle(0, {"h1": "h1", "h0": "h0"}, TcpPeers({})))
        told: list[Outcome] = []
        host.intake.board.watch(told.append)
        with caplog.at_level(logging.INFO):
            protector.parity = Parity(2, 1)
            until(lambda: bool(told))
        protector.close()
    assert [(one.step, one.tier) for one in told if isinstance(one, Failed)] == [(3, PARITY)]
    assert isinstance(told[0], Failed) and OVERTAKEN in told[0].why
    (line,) = [one for one in caplog.records if "not protected" in one.message]
    assert line.levelno == logging.INFO


@pytest.fixture
def shares():
    """The shares of two hosts of one snapshot."""
    rows, found = rows_of(1), []
    for rank, name in enumerate(("h0", "h1")):
        with LocalHost(MemoryStore(name), name, arena_bytes=4 << 20, hold=1) as host:
            plan = plan_of(rows, handling("memory"), rank=rank, hosts=("h0", "h1"))
            host.seal(begin(host, 1, rows, plan, rank=rank))
            host.intake.holding.pin(20)
            (entry,) = Shelf(host.intake).entries().values()
            found.append(share_of(entry))
    return found


def test_shares_travel_and_are_put_together_as_one_manifest(shares):
    travelled = [decode_head(encode_head(share), "a share") for share in shares]
    manifest, table = merge(travelled)
    assert [tensor.name for tensor in manifest.tensors] == ["w", "steps"]
    sums = table.fingerprint_sums()
    assert [tensor.fingerprint for tensor in manifest.tensors] == [sums[0], sums[1]]
    assert np.array_equal(np.unique(table.rows["pack"]), [0, 1])


def test_shares_of_different_snapshots_or_of_too_few_hosts_are_refused(shares):
    one, other = shares
    for wrong in ([one], [one, one], [one, replace(other, digest="another")]):
        with pytest.raises(Corrupt):
            merge(wrong)
    late = replace(other, manifest=replace(other.manifest, generation=9))
    with pytest.raises(Corrupt, match="different snapshots"):
        merge([one, late])


@pytest.mark.parametrize("place", [3, 12, 40, 300, -80])
def test_a_head_with_a_wrong_byte_is_refused(shares, place):
    head = bytearray(encode_head(shares[0]))
    head[place] ^= 8
    try:
        found = decode_head(head, "a share")
    except Corrupt:
        return
    assert place < 16 or place == -80, "only what is read elsewhere, or fills up, may differ"
    assert found.id == shares[0].id
