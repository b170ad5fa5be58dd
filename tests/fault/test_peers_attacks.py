"""Parity that was damaged, swapped or left over is found and never used; strangers are turned away."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import Failed, NoCheckpoint, PeerPolicy
from checkpoint.errors import CheckpointError, PeerLost
from checkpoint.keeper.messages import receive, send
from checkpoint.keeper.peering.dialing import TcpPeers
from checkpoint.keeper.peering.marks import name_of
from checkpoint.keeper.peering.policy import Parity
from checkpoint.redundancy.groups import Group
from checkpoint.redundancy.peers import Place
from checkpoint.redundancy.stripes import prefix_of
from tests.fault.checkpoint_shares import same_rows
from tests.fault.peer_worlds import Hosts, eventually, hosts_of, restored, rows_at

pytestmark = pytest.mark.slow


def parity_places(hosts: Hosts, step: int, num_data: int) -> list[Place]:
    """List where the parity rows of a snapshot lie."""
    peers = TcpPeers(hosts.addresses)
    places = [
        Place(host, name)
        for host in dict.fromkeys(hosts.names)
        for name in peers.keys(host, prefix_of(name_of((1, step))))
        if int(name.rpartition(":")[2].split(".")[1]) >= num_data
    ]
    peers.close()
    return places


def overwrite(hosts: Hosts, place: Place, data: bytes) -> None:
    peers = TcpPeers(hosts.addresses)
    peers.put(place, [data])
    peers.close()


def content(hosts: Hosts, place: Place) -> bytearray:
    peers = TcpPeers(hosts.addresses)
    (found,) = peers.fetch([place])
    peers.close()
    assert found is not None
    return bytearray(found)


def test_a_wrong_byte_in_parity_is_found_and_nothing_wrong_is_restored(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        for place in parity_places(hosts, 1, 2):
            data = content(hosts, place)
            data[-7] ^= 4
            overwrite(hosts, place, bytes(data))
        hosts.kill("h2")
        with hosts.source() as source, pytest.raises(CheckpointError):
            restored(source)


def test_a_wrong_byte_in_parity_of_a_large_chunk_is_found_once_it_is_used_and_told_from_a_wrong_chunk(
    tmp_path,
):
    large = 12 << 17  # 2 MiB for each host: rebuilt where it belongs
    with hosts_of(tmp_path, 3, Parity(3, 1), arena_bytes=16 << 20) as hosts:
        hosts.give(1, rows_at(1, large))
        hosts.await_told("parity", 1)
        stripe = Group(("h0", "h1", "h2")).stripe_of("h2", 1)  # of the second half of what h2 has
        (place,) = [one for one in parity_places(hosts, 1, 2) if f":{stripe}." in one.name]
        data = content(hosts, place)
        data[-7] ^= 4
        overwrite(hosts, place, bytes(data))
        hosts.kill("h2")
        with hosts.source() as source:
            assert source.steps() == [1]
            with pytest.raises(NoCheckpoint, match="has lost row 1"):
                restored(source)


def test_a_wrong_byte_in_one_of_two_parities_is_found_and_made_up_for_by_the_other(tmp_path):
    with hosts_of(tmp_path, 4, Parity(4, 2)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        for place in parity_places(hosts, 1, 2):
            if place.name.split(":")[1].split(".")[1] == "2":  # the first parity of each stripe
                data = content(hosts, place)
                data[len(data) // 2] ^= 1
                overwrite(hosts, place, bytes(data))
        hosts.kill("h3")
        with hosts.source() as source:
            got, rows = restored(source)
            assert same_rows(rows, rows_at(1)) and got.report.bytes_by_source["parity"] > 0


def test_parity_of_another_step_or_generation_is_never_used(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        old = {place.name: bytes(content(hosts, place)) for place in parity_places(hosts, 1, 2)}
        hosts.give(2, rows_at(2))
        hosts.await_told("parity", 2)
        eventually(lambda: not parity_places(hosts, 1, 2), "what is older is let go")
        for place in parity_places(hosts, 2, 2):
            earlier = old[place.name.replace(name_of((1, 2)), name_of((1, 1)))]
            overwrite(hosts, place, earlier)
        hosts.kill("h1")
        with hosts.source() as source, pytest.raises(NoCheckpoint):
            restored(source)


def test_what_an_older_generation_orders_is_not_heard(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1)) as hosts:
        hosts.meet(2)
        hosts.meet(1)  # late
        hosts.give(5, rows_at(5), generation=1)
        hosts.await_told("memory", 5)
        hosts.give(3, rows_at(3), generation=2)
        hosts.await_told("parity", 3)
        assert ("Durable", 5) not in hosts.news("h1", "parity")
        hosts.kill("h1")
        with hosts.source() as source:
            assert source.steps() == [3]


def test_a_caller_without_the_token_gets_nothing_and_the_token_is_in_no_log(tmp_path):
    with hosts_of(tmp_path, 2, Parity(2, 1)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        own = hosts.addresses["h0"]
        strangers = TcpPeers({"h0": replace(own, token=hosts.addresses["h1"].token)})
        with pytest.raises(PeerLost):
            strangers.keys("h0", "")
        with socket.create_connection((own.host, own.port), timeout=10) as channel:
            assert receive(channel)["speaks"]
            send(channel, {"verb": "keys", "prefix": "", "challenge": "x", "proof": own.token})
            assert not channel.recv(1), "the connection ends without an answer"
        assert own.token not in repr(own) + repr(hosts.addresses)
        for name in hosts.addresses:
            log = hosts.config(name).log_path.read_text()
            assert not any(one.token in log for one in hosts.addresses.values())
            command = Path(f"/proc/{hosts.pid(name)}/cmdline").read_text()
            assert not any(one.token in command for one in hosts.addresses.values())


def test_parity_that_finds_no_room_is_reported_and_holds_up_neither_captures_nor_the_store(tmp_path):
    large = 12 << 17  # floats: 2 MiB for each host
    with hosts_of(tmp_path, 3, Parity(3, 1, budget_mib=1), arena_bytes=16 << 20) as hosts:
        hosts.give(1, rows_at(1, large))
        hosts.await_told("parity", 1, "Failed")
        hosts.await_told("memory", 1)
        failed = [one for one in hosts.told["h0"] if isinstance(one, Failed)]
        assert "budget_mib" in failed[0].why
        for name in hosts.addresses:
            hosts.handles[name].listen(PeerPolicy("127.0.0.1", parity=Parity(3, 1)))
        hosts.give(2, rows_at(2, large))
        hosts.await_told("parity", 2)
