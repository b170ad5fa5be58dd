"""The newest snapshots stay in the arena, proved, and make room in order; what is said of them is true."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Catalog, Failed, LocalHost, Skipped, load, verify
from checkpoint.engine.arena import Sizing
from checkpoint.engine.contract import Depth, Outcome
from checkpoint.engine.source import HeldSource
from checkpoint.errors import StoreUnavailable
from checkpoint.format.codec import Codec, checksum
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_shares import begin, give, handling, held_rows, plan_of, rows_of, same_rows, told
from tests.fault.checkpoint_worlds import MIB, QUICK

ROWS_BYTES = 1 << 18
MEMORY = handling("memory")


@pytest.fixture
def store():
    return MemoryStore("hold")


def host_of(store, *, hold=1, arena_bytes=MIB, tuning=QUICK):
    return LocalHost(store, arena_bytes=arena_bytes, hold=hold, tuning=tuning)


def await_told(host, seen, wanted):
    """Wait until a host has told something (kind, tier, step)."""
    deadline = time.monotonic() + 20
    while wanted not in told(host, seen):
        assert time.monotonic() < deadline, (wanted, seen)
        time.sleep(0.005)


def held_step(host):
    with host.held() as held:
        return None if held is None else held.manifest.step


def test_a_snapshot_of_depth_memory_is_held_proved_and_never_written(store):
    with host_of(store) as host:
        seen: list[Outcome] = []
        assert give(host, 3, rows_of(3), MEMORY)
        await_told(host, seen, ("Durable", "memory", 3))
        with host.held() as held:
            assert held is not None
            assert same_rows(held_rows(held), rows_of(3))
            assert held.manifest.step == 3 and held.manifest.metrics == {"loss": 0.5}
            for chunk in held.chunks:
                raw = held.memory[chunk.offset : chunk.offset + chunk.num_bytes]
                assert checksum(raw) == chunk.checksum
    assert told(host, seen) == [("Durable", "memory", 3)]
    assert store.list("") == []


def test_a_held_snapshot_is_a_source_that_a_restore_can_read(store):
    with host_of(store) as host:
        give(host, 3, rows_of(3), MEMORY)
        with host.held() as held:
            source = HeldSource(held)
            assert source.steps() == [3]
            assert len(source.chunks(source.manifest(3))) == 2


def test_a_snapshot_of_depth_store_is_told_of_memory_and_of_the_store(store):
    with host_of(store) as host:
        seen: list[Outcome] = []
        give(host, 1, rows_of(1))
        await_told(host, seen, ("Durable", "store", 1))
        assert sorted(told(host, seen)) == [("Durable", "memory", 1), ("Durable", "store", 1)]
        assert held_step(host) == 1
    assert verify(store).is_sound


def test_a_host_that_holds_nothing_refuses_what_is_for_memory_only(store):
    with host_of(store, hold=0) as host:
        assert not give(host, 1, rows_of(1), MEMORY)
        (outcome,) = host.outcomes()
        assert isinstance(outcome, Failed) and "hold" in outcome.why
        assert held_step(host) is None


@pytest.mark.parametrize("hold", [1, 2, 3])
def test_as_many_as_are_to_be_held_are_and_the_oldest_go_first(store, hold):
    with host_of(store, hold=hold, arena_bytes=4 * MIB) as host:
        for step in range(1, 7):
            give(host, step, rows_of(step), MEMORY)
            assert held_step(host) == step
        entries = host._intake._register.held()
        assert [entry.step for entry in entries] == list(range(7 - hold, 7))
        size = plan_of(rows_of(1)).num_bytes
        assert host._arena.num_lent_bytes <= hold * (size + 64)


def test_a_new_capture_takes_the_place_of_older_held_ones_but_not_of_the_newest(store):
    with host_of(store, hold=3) as host:  # room for three
        for step in range(1, 6):
            give(host, step, rows_of(step, int(ROWS_BYTES * 1.2)), MEMORY)
            assert held_step(host) == step
        assert host.pressure().num_bare == 0
        assert [entry.step for entry in host._intake._register.held()] == [3, 4, 5]


@pytest.mark.parametrize("hold", [0, 1])
def test_who_asks_to_hold_fewer_gets_the_room_at_once(store, hold):
    with host_of(store, hold=3, arena_bytes=4 * MIB) as host:
        for step in (1, 2, 3):
            give(host, step, rows_of(step))
            assert held_step(host) == step
        assert host.intake.drain(20)
        size = host._arena.num_lent_bytes // 3
        host.intake.adopt(hold, 4 * MIB, Sizing())
        assert host._arena.num_lent_bytes == hold * size
        assert [entry.step for entry in host.intake._register.held()] == [3][:hold]


@pytest.mark.parametrize("depth", ["memory", "store"])
def test_what_one_rank_has_sealed_stays_until_its_neighbours_have_too(store, depth):
    rows, treated = rows_of(1), handling(depth)
    with host_of(store) as host:
        first = begin(host, 1, rows, plan_of(rows, treated, rank=0, hosts=("local",) * 2), rank=0)
        host.seal(first)
        host.seal(begin(host, 1, rows, plan_of(rows, treated, rank=1, hosts=("local",) * 2), rank=1))
        with host.held() as held:
            assert held is not None and same_rows(held_rows(held), rows)


def test_in_an_arena_for_one_the_held_snapshot_goes_when_the_next_one_comes_and_that_is_counted(
    store, caplog
):
    with host_of(store, hold=1) as host:
        for step in range(1, 4):
            ticket = begin(
                host, step, rows_of(step, 3 * ROWS_BYTES), plan_of(rows_of(step, 3 * ROWS_BYTES), MEMORY)
            )
            assert ticket is not None
            assert held_step(host) is None
            host.seal(ticket)
            assert held_step(host) == step
        assert host.pressure().num_bare == 2
    assert [record.getMessage() for record in caplog.records if "holds no snapshot" in record.getMessage()]


def test_the_newest_snapshot_stays_while_waiting_may_make_room(store):
    half = 2 * ROWS_BYTES - 128
    with host_of(store, hold=1) as host:
        give(host, 1, rows_of(1, half), MEMORY)
        assert held_step(host) == 1
        other = begin(host, 2, rows_of(2, half), plan_of(rows_of(2, half), MEMORY), generation=1)
        assert other is not None
        impatient = plan_of(rows_of(3, half), handling("memory", max_wait_s=0.0))
        assert begin(host, 3, rows_of(3, half), impatient, generation=2) is None
        assert held_step(host) == 1 and host.pressure().num_bare == 0
        host.spoil(other, "on purpose")
        assert begin(host, 4, rows_of(4, half), impatient, generation=2) is not None
        assert held_step(host) == 1


def test_a_snapshot_that_someone_reads_stays_until_it_was_read(store):
    with host_of(store, hold=1) as host:
        large = rows_of(1, 3 * ROWS_BYTES)
        give(host, 1, large, MEMORY)
        with host.held() as held:
            assert not give(host, 2, rows_of(2, 3 * ROWS_BYTES), handling("memory", max_wait_s=0.0))
            assert same_rows(held_rows(held), large)
        assert isinstance(host.outcomes()[-1], Skipped) and host.pressure().num_skipped == 1
        assert give(host, 3, rows_of(3, 3 * ROWS_BYTES), MEMORY)
        assert held_step(host) == 3


def test_a_capture_waits_for_a_reader_and_says_how_long(store):
    with host_of(store, hold=1) as host:
        give(host, 1, rows_of(1, 3 * ROWS_BYTES), MEMORY)
        with host.held():
            late = threading.Thread(target=give, args=(host, 2, rows_of(2, 3 * ROWS_BYTES), MEMORY))
            late.start()
            late.join(0.05)
            assert late.is_alive()
        late.join(20)
        assert held_step(host) == 2
        assert host.pressure().num_waits == 1 and host.pressure().waited_s > 0.04


def test_a_torn_snapshot_is_not_held_and_the_one_before_it_is(store):
    with host_of(store, hold=2) as host:
        give(host, 1, rows_of(1), MEMORY)
        ticket = begin(host, 2, rows_of(2), plan_of(rows_of(2), MEMORY))
        host.spoil(ticket, "torn on purpose")
        assert held_step(host) == 1
        seen: list[Outcome] = []
        await_told(host, seen, ("Failed", "", 2))
    assert ("Durable", "memory", 2) not in told(host, seen)


def test_a_snapshot_whose_store_fails_is_held_all_the_same(store):
    class Away(MemoryStore):
        def put_new(self, key, data):
            raise StoreUnavailable("away on purpose")

    with host_of(Away("away")) as host:
        seen: list[Outcome] = []
        give(host, 1, rows_of(1))
        await_told(host, seen, ("Failed", "", 1))
        with host.held() as held:
            assert held is not None and same_rows(held_rows(held), rows_of(1))


def test_all_local_ranks_together_make_one_held_snapshot(store):
    hosts = ("local", "local", "local")
    with host_of(store, hold=1) as host:
        rows = {"w": np.arange(3000, dtype=np.float32), "v": np.ones(30, np.uint8)}
        tickets = [
            begin(session, 1, rows, plan_of(rows, MEMORY, rank=rank, hosts=hosts), rank=rank)
            for rank, session in enumerate(host.session() for _ in hosts)
        ]
        assert held_step(host) is None
        for ticket in tickets:
            host.seal(ticket)
        with host.held() as held:
            assert held is not None and same_rows(held_rows(held), rows)


def test_a_share_of_a_world_of_several_hosts_is_not_taken_for_the_whole(store):
    with host_of(store, hold=1) as host:
        rows = rows_of(1)
        host.seal(begin(host, 1, rows, plan_of(rows, MEMORY, hosts=("local", "b"))))
        seen: list[Outcome] = []
        await_told(host, seen, ("Durable", "memory", 1))
        assert held_step(host) is None


def test_a_newer_generation_is_held_in_preference_to_a_zombie_s_later_steps(store):
    with host_of(store, hold=2) as host:
        for generation, step in ((2, 5), (1, 9)):
            rows = rows_of(step)
            host.seal(begin(host, step, rows, plan_of(rows, MEMORY), generation=generation))
        assert held_step(host) == 5


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["memory", "store", "spoil", "read", "unread"]), st.integers(1, 5)),
        max_size=25,
    ),
    hold=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_whatever_comes_the_arena_is_never_overdrawn_and_every_snapshot_gets_its_one_word(actions, hold):
    store = MemoryStore("any")
    finals: dict[int, list[str]] = {}
    with host_of(store, hold=hold) as host:
        readers, newest = [], None
        for step, (action, eighths) in enumerate(actions, 1):
            if action == "read":
                readers.append(host.held())
                held = readers[-1].__enter__()
                assert (None if held is None else held.manifest.step) == newest
            elif action == "unread" and readers:
                readers.pop().__exit__(None, None, None)
            elif action in ("memory", "store", "spoil"):
                rows = rows_of(step, eighths * MIB // 8)
                depth: Depth = "store" if action == "store" else "memory"
                finals[step] = [depth]
                ticket = begin(host, step, rows, plan_of(rows, handling(depth, max_wait_s=0.0)))
                if ticket is not None and action == "spoil":
                    host.spoil(ticket, "on purpose")
                elif ticket is not None:
                    host.seal(ticket)
                    newest = step
                held = [entry.step for entry in host._intake._register.held()]
                if newest not in held:  # it had to go: a store has it, or there was nothing else to make room
                    assert newest is None or finals[newest] == ["store"] or host.pressure().num_bare
                    newest = held[-1] if held else None
            assert host._arena.num_lent_bytes <= MIB
        for reader in readers:
            reader.__exit__(None, None, None)
        assert host._intake.drain(20)
        outcomes = host.outcomes()
    for step, (wanted,) in finals.items():
        mine = [
            one
            for one in outcomes
            if one.step == step and not (wanted == "store" and getattr(one, "tier", "") == "memory")
        ]
        assert len(mine) == 1, (step, mine)
    for step in Catalog(store).steps():
        assert load(store, step).manifest.step == step and finals[step] == ["store"]


def test_a_pinned_snapshot_stays_as_it_is_when_no_more_are_to_be_held_from_now_on():
    class Stuck(MemoryStore):
        def __init__(self):
            super().__init__("stuck")
            self.goes_on = threading.Event()

        def put_new(self, key, data):
            self.goes_on.wait(20)
            super().put_new(key, data)

    rng = np.random.default_rng(0)
    rows = {f"t{number}": rng.standard_normal(1 << 16, dtype=np.float32) for number in range(100)}
    store = Stuck()
    with host_of(store, arena_bytes=32 * MIB) as host:
        assert give(host, 1, rows, handling(codec=Codec.PLANES))
        await_told(host, [], ("Durable", "memory", 1))
        with host.held() as held:  # most of it waits for the store, which would be given it compressed
            assert held is not None
            host.intake.adopt(0, 32 * MIB, Sizing())
            store.goes_on.set()
            assert host.intake.drain(20)
            assert same_rows(held_rows(held), rows)
