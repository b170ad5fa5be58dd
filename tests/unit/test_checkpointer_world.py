"""A process finds its place: hosts have names that keys can hold, each maker claims a newer generation."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from checkpoint.checkpointer.world import _host_names, join_world
from checkpoint.errors import CheckpointError
from checkpoint.store.memory import MemoryStore

machines = st.lists(
    st.tuples(st.text(max_size=40), st.sampled_from(["boot1", "boot2"])), min_size=1, max_size=5
)


@given(machines)
@example([("Node-1.cluster", "a"), ("node1cluster", "b")])
@example([("\u65e5\u672c", "a"), ("", "a")])
def test_each_machine_has_one_name_of_its_own_that_a_key_can_hold(found):
    names = _host_names(found)
    assert all(re.fullmatch(r"[a-z0-9]{1,32}", name) for name in names)
    by_machine = dict(zip(found, names, strict=True))
    assert [by_machine[machine] for machine in found] == list(names)
    assert len(set(by_machine.values())) == len(by_machine)
    assert _host_names(found[:1])[0] == _host_names(found[:1] * 2)[0]


def test_alone_a_process_is_rank_0_of_one_in_a_generation_of_its_own():
    store = MemoryStore("worlds")
    first, second = join_world(store), join_world(store)
    assert (first.rank, first.size, first.generation, second.generation) == (0, 1, 1, 2)
    assert first.everybody("said") == ["said"] and first.share.hosts == (first.host,)


def test_what_rank_0_cannot_say_is_raised():
    def fail() -> int:
        raise CheckpointError("no store")

    with pytest.raises(CheckpointError, match="no store"):
        join_world(MemoryStore("worlds")).tell(fail)
