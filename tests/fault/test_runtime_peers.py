"""Keepers of two hosts that meet over a driver's rendezvous: what one held is rebuilt after it was killed."""

import pytest

from checkpoint import Parity
from elastic.control.instructions import FormWorld, Manner
from elastic.runtime.peers import Home, Neighbours
from elastic.runtime.world import open_rendezvous
from tests.fault.checkpoint_shares import same_rows
from tests.fault.peer_worlds import hosts_of, restored, rows_at

pytestmark = pytest.mark.slow


def test_keepers_meet_world_by_world_and_a_lost_host_s_share_comes_back(tmp_path):
    parity = Parity(2, 1, patience_s=10.0)
    with hosts_of(tmp_path, 2, parity) as hosts:
        store, endpoint = open_rendezvous("127.0.0.1")
        neighbours = {
            name: Neighbours(handle, Home(name, "127.0.0.1", parity))
            for name, handle in hosts.handles.items()
        }
        form = FormWorld(7, ("w0", "w1"), ("h0", "h1"), Manner.AT_ONCE, "a test")
        for member, one in zip(form.members, neighbours.values(), strict=True):
            one.meet(form, member, endpoint)
        for step in range(1, 4):
            hosts.give(step, rows_at(step), generation=7)
            hosts.await_told("memory", step)
        hosts.await_told("parity", 3)
        hosts.kill("h1")
        with neighbours["h0"].sources() as sources:
            got, rows = restored(sources)
            assert got.manifest.step == 3 and same_rows(rows, rows_at(3))
            assert got.report.bytes_by_source["parity"] > 0
        del store
