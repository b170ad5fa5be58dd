"""Plans for sharded parameters: every row has a holder, moves fill what is missing, copies are apart."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.resharding import Cut, arrange, lost_tensors, plan_moves

ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
CUTS = st.integers(1, 6).flatmap(lambda n: st.builds(Cut, st.just(n), st.integers(0, n - 1)))
WORLDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=12)


@given(st.integers(0, 50), st.integers(1, 12))
def test_the_parts_of_a_tensor_are_its_rows_in_order_each_once(num_rows, shards):
    parts = [Cut(shards, index).rows(num_rows) for index in range(shards)]
    assert [row for part in parts for row in part] == list(range(num_rows))


@given(WORLDS, st.integers(1, 5))
def test_every_shard_has_its_copies_and_each_rank_is_given_every_shard_by_a_holder(hosts, copies):
    arrangement = arrange(hosts, copies)
    ranks = range(len(hosts))
    held = [arrangement.cut(rank).index for rank in ranks]
    assert all(held.count(shard) >= min(copies, len(hosts)) for shard in range(arrangement.shards))
    for rank in ranks:
        sources = [arrangement.source(rank, shard) for shard in range(arrangement.shards)]
        assert [held[source] for source in sources] == list(range(arrangement.shards))
        assert rank in sources


@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 4))
def test_copies_lie_on_different_hosts_where_hosts_are_equally_large(shards, copies, scale):
    hosts = [f"host {rank % copies}" for rank in range(shards * copies * scale)]
    arrangement = arrange(hosts, copies)
    for shard in range(arrangement.shards):
        holders = [rank for rank in range(len(hosts)) if arrangement.cut(rank).index == shard]
        assert len({hosts[rank] for rank in holders}) == copies


@given(ROWS, st.lists(st.none() | CUTS, min_size=1, max_size=7), st.data())
def test_moves_bring_each_rank_exactly_the_rows_it_wants_and_has_not(num_rows, held, data):
    wanted = data.draw(st.lists(CUTS, min_size=len(held), max_size=len(held)))
    lost = lost_tensors(num_rows, held)
    there = [number for number in range(len(num_rows)) if number not in lost]
    moves = plan_moves([num_rows[number] for number in there], held, wanted)
    for receiver, cut in enumerate(wanted):
        for place, number in enumerate(there):
            own = held[receiver]
            rows = [*(own.rows(num_rows[number]) if own else ())]
            for (sender, to), each in moves.items():
                given_rows = [
                    row for move in each if move.number == place for row in range(move.start, move.stop)
                ]
                if to == receiver:
                    giver = held[sender]
                    assert giver is not None
                    assert set(given_rows) <= set(giver.rows(num_rows[number]))
                    assert not set(given_rows) & set(rows)
                    rows += given_rows
            assert set(rows) >= set(cut.rows(num_rows[number]))


@given(ROWS, st.integers(1, 6), st.data())
def test_lost_tensors_are_those_with_rows_that_nobody_holds(num_rows, shards, data):
    gone = data.draw(st.sets(st.integers(0, shards - 1)))
    held = [None if index in gone else Cut(shards, index) for index in range(shards)]
    lost = {
        number
        for number, length in enumerate(num_rows)
        if any(Cut(shards, each).rows(length) for each in gone)
    }
    assert set(lost_tensors(num_rows, held)) == lost
