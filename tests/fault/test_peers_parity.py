"""Keepers that stand for hosts are killed; what they held comes back from their peers, bit for bit."""

import pytest

from checkpoint import NoCheckpoint
from checkpoint.keeper.peering.policy import Parity
from tests.fault.checkpoint_shares import same_rows
from tests.fault.peer_worlds import hosts_of, restored, rows_at


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


@pytest.mark.parametrize(("num_hosts", "losses", "ranks"), [(2, 1, 2), (3, 1, 2), (4, 2, 1)])
def test_what_lost_hosts_held_is_rebuilt_bit_for_bit_and_the_report_says_so(
    tmp_path, num_hosts, losses, ranks
):
    with hosts_of(tmp_path, num_hosts, Parity(num_hosts, losses), ranks_each=ranks) as hosts:
        hosts.give(1, rows_at(1))
        hosts.await_told("parity", 1)
        lost = [f"h{number}" for number in range(num_hosts - losses, num_hosts)]
        for name in lost:
            hosts.kill(name)
        with hosts.source() as source:
            got, rows = restored(source)
            assert got.manifest.step == 1 and same_rows(rows, rows_at(1))
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
