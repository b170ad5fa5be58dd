"""Suspicion: silence is judged by the pauses that members made before."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.control.suspicion import PAUSES, Suspicion


def calm(suspicion: Suspicion, seconds: float) -> None:
    """Let a member answer every 0.2 s, with a look every 0.1 s."""
    for number in range(int(seconds * 10)):
        suspicion.look({"w0": 0.1 + 0.1 * (number % 2), "w1": 0.1})


def test_a_silence_of_a_second_is_suspicious_where_everybody_answers_at_once() -> None:
    suspicion = Suspicion(1.0)
    calm(suspicion, 120.0)
    suspicion.look({"w0": 1.1, "w1": 0.9})
    assert suspicion.silent() == {"w0"}


def test_a_member_that_was_silent_and_came_back_makes_everybody_more_patient_for_a_while() -> None:
    suspicion = Suspicion(1.0)
    calm(suspicion, 120.0)
    suspicion.look({"w0": 0.9, "w1": 0.1})
    suspicion.look({"w0": 0.0, "w1": 1.5})
    assert suspicion.silent() == frozenset()
    suspicion.look({"w0": 0.0, "w1": 4.0})
    assert suspicion.silent() == {"w1"}
    suspicion.look({"w0": 0.0})  # it was ended; that is no pause
    calm(suspicion, 120.0)
    suspicion.look({"w0": 1.1})
    assert suspicion.silent() == {"w0"}


@given(st.floats(0.1, 60.0), st.lists(st.floats(0.0, 100.0), min_size=1, max_size=50))
def test_nobody_is_suspected_before_the_floor_nor_within_the_longest_pause(floor_s, pauses) -> None:
    suspicion = Suspicion(floor_s)
    for pause in pauses:
        suspicion.look({"w0": pause})
        suspicion.look({"w0": 0.0})
    longest = max(pauses[-1], 0.0)
    suspicion.look({"w0": min(floor_s, PAUSES * longest)})
    assert suspicion.silent() == frozenset()
