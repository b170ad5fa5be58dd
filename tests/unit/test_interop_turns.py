"""Turns at writing behind a URL: what a writer does that was silent for too long itself."""

from collections.abc import Callable

import pytest

from checkpoint.errors import Conflict, StoreUnavailable
from checkpoint.interop.turns import Beat, Turn, taking_turn
from checkpoint.store.memory import MemoryStore

DULL, QUICK = Beat(every_s=1000.0, silence_s=0.2), Beat(every_s=0.05, silence_s=0.2)
ALWAYS_LATE = Beat(every_s=1000.0, silence_s=0.0)


class Held:
    """A store whose next `put` is held up until something else was done."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.first: Callable[[], object] = lambda: None

    def put(self, key: str, data: bytes) -> None:
        self.first()
        self._store.put(key, data)

    def __getattr__(self, name: str):
        return getattr(self._store, name)


class Late(Held):
    """A store whose puts are said to have failed, and may land later."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.puts: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        self.puts[key] = data
        broken()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("turns")


def taken(store, beat: Beat) -> Turn:
    turn = Turn(store, 1, url="there", beat=beat)
    turn.take()
    return turn


def take_and_finish(store) -> None:
    with taking_turn(store, "there", QUICK):
        pass


def test_a_turn_that_was_taken_over_while_its_writer_was_about_to_show_it_is_not_revived(store):
    held = Held(store)
    turn = taken(held, DULL)
    held.first = lambda: take_and_finish(store)
    with pytest.raises(Conflict, match="went on with there"):
        turn.show()
    assert not store.list("")
    with pytest.raises(Conflict):
        turn.check()


def test_a_turn_that_nobody_took_meanwhile_is_taken_again(store):
    turn = taken(store, ALWAYS_LATE)
    for _ in range(3):
        turn.show()
    assert [entry.key for entry in store.list("")] == ["000004"]
    turn.give_back()
    assert not store.list("")


def test_of_a_late_writer_and_one_that_takes_over_one_goes_on(store):
    turn = taken(store, ALWAYS_LATE)
    other = Turn(store, 2, url="there", beat=QUICK)
    other.take()
    with pytest.raises(Conflict):
        turn.show()
    other.show()


@pytest.mark.parametrize("num_failed", [1, 2])
def test_a_writer_whose_puts_failed_for_longer_than_the_silence_takes_its_turn_again(store, num_failed):
    held = Held(store)
    turn = taken(held, DULL)
    turn.show()
    held.first = broken
    for _ in range(num_failed):
        with pytest.raises(StoreUnavailable):
            turn.show()
    turn._shown_s -= DULL.silence_s  # what a clock would say after the silence
    held.first = lambda: None
    turn.show()
    assert [entry.key for entry in store.list("")] == ["000002"]
    turn.give_back()
    assert not store.list("")


def test_a_put_that_failed_and_lands_after_a_takeover_revives_nothing(store):
    late = Late(store)
    turn = taken(late, DULL)
    with pytest.raises(StoreUnavailable):
        turn.show()
    take_and_finish(store)
    for key, data in late.puts.items():
        store.put(key, data)
    turn._shown_s -= DULL.silence_s
    with pytest.raises(Conflict, match="went on with there"):
        turn.show()


def broken() -> None:
    raise StoreUnavailable("down")
