"""Dealing a sharded optimizer's state: everything is somewhere else as well, evenly, and little moves."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.sharding import Holders, deal_states, lost_states, moves

sizes = st.lists(st.integers(0, 1000), min_size=1, max_size=30)
worlds = st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)
copies = st.integers(1, 3)


def held_by(holders: Holders, size: int) -> list[set[int]]:
    return [{number for number, ranks in enumerate(holders) if rank in ranks} for rank in range(size)]


@given(sizes, worlds, copies)
def test_each_state_is_on_as_many_ranks_as_asked_for_and_on_different_hosts_where_there_are_as_many(
    num_bytes, hosts, copies
):
    for ranks in deal_states(num_bytes, [()] * len(hosts), hosts, copies):
        assert len(set(ranks)) == len(ranks) == min(copies, len(hosts))
        assert len({hosts[rank] for rank in ranks}) == min(copies, len(set(hosts)))


@given(sizes, st.integers(1, 6), copies)
def test_no_rank_holds_more_than_its_share_and_one_state(num_bytes, size, copies):
    hosts = [str(rank) for rank in range(size)]
    holders = deal_states(num_bytes, [()] * size, hosts, copies)
    loads = [sum(num_bytes[number] for number in each) for each in held_by(holders, size)]
    assert sum(loads) == min(copies, size) * sum(num_bytes)
    assert max(loads) <= sum(loads) / size + max(num_bytes)


@given(sizes, st.integers(2, 6), st.data())
def test_with_two_copies_no_single_loss_takes_state_along(num_bytes, size, data):
    hosts = [str(rank) for rank in range(size)]
    holders = deal_states(num_bytes, [()] * size, hosts, 2)
    victim = data.draw(st.integers(0, size - 1))
    held = held_by(holders, size)
    survivors = [each for rank, each in enumerate(held) if rank != victim]
    assert not lost_states(survivors, len(num_bytes))
    assert lost_states([set[int]() for _ in survivors], len(num_bytes)) == list(range(len(num_bytes)))


@given(sizes, worlds, worlds, copies, st.data())
def test_after_the_moves_everybody_holds_what_was_dealt_and_nobody_sends_what_he_lacks(
    num_bytes, before, after, copies, data
):
    old = held_by(deal_states(num_bytes, [()] * len(before), before, copies), len(before))
    held = [data.draw(st.sampled_from(old)) | set() for _ in after]
    for number in lost_states(held, len(num_bytes)):
        held[0].add(number)
    holders = deal_states(num_bytes, held, after, copies)
    have = [set(each) for each in held]
    for (sender, receiver), numbers in moves(held, holders).items():
        assert set(numbers) <= held[sender]
        assert not set(numbers) & have[receiver]
        have[receiver] |= set(numbers)
    assert all(wanted <= had for wanted, had in zip(held_by(holders, len(after)), have, strict=True))


@given(st.integers(1, 30), st.integers(1, 6), copies)
def test_equal_states_do_not_move_when_nobody_left(num_states, size, copies):
    hosts = [str(rank) for rank in range(size)]
    held = held_by(deal_states([7] * num_states, [()] * size, hosts, copies), size)
    moved = sum(map(len, moves(held, deal_states([7] * num_states, held, hosts, copies)).values()))
    assert moved <= copies * size
