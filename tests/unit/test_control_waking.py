"""The waking clock runs on with the driver's, and leaves out what the driver slept through."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.suspicion import Suspicion
from elastic.control.waking import NAP_S, WakingClock


def test_a_long_sleep_counts_as_a_nap() -> None:
    clock = WakingClock()
    read = [clock.read(now) for now in (5.0, 5.25, 1205.25, 1205.5)]
    assert read == [5.0, 5.25, 5.25 + NAP_S, 5.5 + NAP_S]


@given(st.lists(st.floats(0.0, 100.0), max_size=50))
def test_it_never_runs_back_nor_faster_than_the_drivers(gaps) -> None:
    clock, now, before = WakingClock(), 0.0, WakingClock().read(0.0)
    clock.read(now)
    for gap in gaps:
        now += gap
        read = clock.read(now)
        assert -1e-9 <= read - before <= min(gap, NAP_S) + 1e-9
        before = read


def test_what_was_slept_through_is_taken_from_each_silence_until_it_ends() -> None:
    suspicion = Suspicion(1.0)
    suspicion.look({"w0": 0.1, "w1": 0.1})
    suspicion.look({"w0": 60.2, "w1": 60.2}, slept_s=60.0)
    assert suspicion.silent() == frozenset()
    suspicion.look({"w0": 0.1, "w1": 62.0})
    assert suspicion.silent() == frozenset()
    suspicion.look({"w0": 0.1, "w1": 64.0})
    assert suspicion.silent() == {"w1"}
    assert suspicion.limit_s < 10.0, "a sleep is nobody's pause"
