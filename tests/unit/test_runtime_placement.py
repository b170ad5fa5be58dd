"""Where a member starts: on the node with fewest of its run's, if it has room."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.runtime.placement import Room, choose_room, strategy_for

CPU = {"CPU": 1.0}


def room(node: str, num_members: int, free: float, num_starting: int = 0) -> Room:
    return Room(node, num_members, num_starting, {"CPU": free})


def test_a_node_without_members_is_taken_before_one_with_more_room():
    assert choose_room([room("a", 1, 64.0), room("b", 0, 1.0)], CPU) == room("b", 0, 1.0)


def test_a_node_without_room_is_passed_over_and_without_any_room_ray_waits_for_some():
    assert choose_room([room("a", 1, 1.0), room("b", 0, 0.5)], CPU) == room("a", 1, 1.0)
    assert choose_room([room("a", 1, 0.0)], CPU) is None
    assert strategy_for(None) == "SPREAD"


def test_what_a_starting_member_will_take_is_not_given_twice():
    assert choose_room([room("a", 1, 1.0, num_starting=1)], CPU) is None
    assert choose_room([Room("a", 0, 0, {"CPU": 8.0})], {"CPU": 1.0, "GPU": 1.0}) is None


def test_only_where_it_protects_nothing_a_member_may_go_elsewhere():
    assert not strategy_for(room("a" * 56, 0, 1.0)).soft
    assert strategy_for(room("a" * 56, 1, 1.0)).soft


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 24))
def test_no_node_gets_a_second_member_while_one_with_room_has_none(rooms, num_members):
    counts = [0] * len(rooms)
    for _ in range(num_members):
        chosen = choose_room([room(str(n), counts[n], size - counts[n]) for n, size in enumerate(rooms)], CPU)
        if chosen is None:
            assert counts == rooms
            return
        counts[int(chosen.node)] += 1
    for n, size in enumerate(rooms):
        assert counts[n] == size or max(counts) - counts[n] <= 1
