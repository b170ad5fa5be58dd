"""Keepers that stand for hosts are killed; what they held comes back from their peers, bit for bit."""

import os
import signal
import time

import pytest

from checkpoint import NoCheckpoint
from checkpoint.keeper.peering.policy import Parity
from tests.fault.checkpoint_shares import handling, same_rows
from tests.fault.peer_worlds import eventually, hosts_of, restored, rows_at

pytestmark = pytest.mark.slow

SMALL, LARGE = 12 << 12, 12 << 17  # large chunks are read and rebuilt right where they belong


def test_the_newest_step_that_all_hosts_hold_is_restored_from_their_memories(tmp_path):
    with hosts_of(tmp_path, 3, None) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("memory", 1)
        hosts.give(2, rows_at(2), to=("h0", "h1"))
        hosts.await_told("memory", 2, names=("h0", "h1"))
        with hosts.source() as source:
            assert source.steps() == [], "each holds one, and not the same"
        hosts.give(2, rows_at(2), to=("h2",))
        hosts.await_told("memory", 2)
        with hosts.source("h1") as source:
            got, rows = restored(source)
            assert got.manifest.step == 2 and same_rows(rows, rows_at(2))
            assert set(got.report.bytes_by_source) == {"memory", "peers"}


@pytest.mark.parametrize(
    ("num_hosts", "losses", "ranks", "num_floats"),
    [(2, 1, 2, SMALL), (3, 1, 2, SMALL), (4, 2, 1, SMALL), (3, 1, 1, LARGE), (3, 2, 1, LARGE)],
)
def test_what_lost_hosts_held_is_rebuilt_bit_for_bit_and_the_report_says_so(
    tmp_path, num_hosts, losses, ranks, num_floats
):
    policy = Parity(num_hosts, losses)
    with hosts_of(tmp_path, num_hosts, policy, ranks_each=ranks, arena_bytes=16 << 20) as hosts:
        hosts.give(1, rows_at(1, num_floats))
        hosts.await_told("parity", 1)
        lost = [f"h{number}" for number in range(num_hosts - losses, num_hosts)]
        for name in lost:
            hosts.kill(name)
        with hosts.source() as source:
            got, rows = restored(source)
            assert got.manifest.step == 1 and same_rows(rows, rows_at(1, num_floats))
            assert got.report.bytes_by_source["parity"] > 0 and sorted(source.rebuilt()) == lost
            assert all(num_bytes > 0 for num_bytes in source.rebuilt().values())


def test_more_losses_than_parity_makes_up_for_leave_nothing_to_restore(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        hosts.kill("h1")
        hosts.kill("h2")
        with hosts.source() as source, pytest.raises(NoCheckpoint):
            restored(source)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03])
def test_a_host_killed_while_parity_is_encoded_costs_at_most_that_snapshot(tmp_path, delay_s):
    large = 12 << 17
    with hosts_of(tmp_path, 3, Parity(3, 1, patience_s=5.0), arena_bytes=16 << 20) as hosts:
        hosts.give(1, rows_at(1, large))
        hosts.await_told("parity", 1)
        hosts.give(2, rows_at(2, large))
        time.sleep(delay_s)
        hosts.kill("h1")
        with hosts.source() as source:
            got, rows = restored(source)
            assert got.manifest.step in (1, 2) and same_rows(rows, rows_at(got.manifest.step, large))


def test_captures_and_the_store_go_on_while_a_peer_hangs_and_parity_goes_on_after_it(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1, patience_s=1.0)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        os.kill(hosts.pid("h2"), signal.SIGSTOP)
        for step in range(2, 6):
            hosts.give(step, rows_at(step), to=("h0", "h1"), treated=handling("memory", max_wait_s=5.0))
            hosts.await_told("memory", step, names=("h0", "h1"))
        eventually(lambda: "Failed" in dict(hosts.news("h0", "parity")))
        os.kill(hosts.pid("h2"), signal.SIGCONT)
        hosts.give(6, rows_at(6))
        hosts.await_told("memory", 6)
        for step in range(7, 40):
            if ("Durable", step - 1) in hosts.news("h0", "parity"):
                break
            hosts.give(step, rows_at(step))
            hosts.await_told("memory", step)
            time.sleep(0.3)
        assert any(kind == "Durable" and step > 5 for kind, step in hosts.news("h0", "parity"))


def test_a_capture_takes_the_room_of_a_protected_snapshot_sooner_than_it_waits(tmp_path):
    large = 12 << 16  # floats: 1 MiB for each host, so that two snapshots fill the arena
    with hosts_of(tmp_path, 3, Parity(3, 1), arena_bytes=(9 << 20) // 4) as hosts:
        hosts.give(1, rows_at(1, large))
        hosts.await_told("parity", 1)
        for step in range(2, 8):
            hosts.give(step, rows_at(step, large), treated=handling("memory", max_wait_s=20.0))
            hosts.await_told("memory", step)
        assert all(handle.pressure().num_skipped == 0 for handle in hosts.handles.values())
        with hosts.source() as source:
            assert same_rows(restored(source)[1], rows_at(7, large))


def test_a_host_that_dies_while_it_is_read_is_rebuilt_on_the_way(tmp_path):
    with hosts_of(tmp_path, 3, Parity(3, 1)) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        with hosts.source() as source:
            assert source.manifest(1).step == 1 and source.rebuilt() == {}
            hosts.kill("h2")
            got, rows = restored(source)
            assert same_rows(rows, rows_at(1)) and list(source.rebuilt()) == ["h2"]
            assert got.report.bytes_by_source["parity"] > 0


def test_what_goes_to_the_store_is_protected_too_and_both_are_told(tmp_path):
    with hosts_of(tmp_path, 2, Parity(2, 1)) as hosts:
        hosts.give(1, rows_at(1), treated=handling("store"))
        hosts.await_told("parity", 1)
        hosts.await_told("store", 1)
        hosts.await_told("memory", 1)
