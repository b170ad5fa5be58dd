"""Turns at writing behind a URL, where no kernel locks: one writer at a time, and a killed one's turn ends.

A turn is an object that only its writer makes (`put_new`) and keeps changing. Whoever finds one that has not
changed for a while, by their own clock, takes the turn after it; of several that do, one gets it. So must its
writer, if it was silent for that long itself: to change the object now could revive what was taken over.
"""

import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from checkpoint.engine.pipeline import Crew
from checkpoint.errors import AlreadyExists, Conflict, NotFound, StoreError
from checkpoint.store.contract import Store

TURNS = ".holdfast-turns"  # the folder of these objects, which no reader minds
BUSY = "another conversion is just writing {}: let it finish or end it, or give another target"
_LOST = "another conversion went on with {} while this one was silent for too long: look what it made"
_NUM_LOOKS = 4  # for each change of somebody else's turn


@dataclass(frozen=True, slots=True)
class Beat:
    """How often a writer shows that it lives, and after how long a silence another takes over."""

    every_s: float = 5.0
    silence_s: float = 30.0


BEAT = Beat()


class Turn:
    """A turn that was taken. Thread-safe."""

    def __init__(self, store: Store, number: int, *, url: str, beat: Beat) -> None:
        self.key = f"{number:06d}"
        self._store, self._url, self._beat = store, url, beat
        self._token = uuid.uuid4().hex
        self._count = 0
        self._is_lost = False
        self._shown_s = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Make the turn's object. Raises Conflict if somebody else has just done so."""
        try:
            self._store.put_new(self.key, self._value())
        except AlreadyExists:
            raise Conflict(BUSY.format(self._url)) from None

    def check(self) -> None:
        """Raise Conflict if somebody else took over; looks only if they could have."""
        if self._is_lost or time.monotonic() - self._shown_s > self._beat.silence_s / 2:
            self.show()

    def show(self) -> None:
        """Change the turn's object, so that others wait. Raises Conflict if somebody else took over."""
        with self._lock:
            there, began_s = _read(self._store), time.monotonic()
            self._is_lost = self._is_lost or not self._is_mine(there) or max(there) > self.key
            if not self._is_lost:
                self._is_lost = not (self._retake() if self._is_silent() else self._put())
            if self._is_lost:
                raise Conflict(_LOST.format(self._url))
            self._shown_s = began_s

    def _is_silent(self) -> bool:
        """Whether others may have taken this turn for that of a writer that was killed."""
        return time.monotonic() - self._shown_s > self._beat.silence_s

    def _put(self) -> bool:
        """Change the object; whether that was in time. One that was not is removed again."""
        self._store.put(self.key, self._value(1))
        self._count += 1  # only now: a put that failed may have left the object as it was
        if self._is_silent():
            self._store.delete(self.key)
            return False
        return True

    def _retake(self) -> bool:
        """Take the next turn, as whoever takes over would; whether it was free, and the old one untouched."""
        old, value = self.key, self._value()
        self.key = f"{int(old) + 1:06d}"
        try:
            self._store.put_new(self.key, value)
        except AlreadyExists:
            return False
        if _read(self._store) == {old: value, self.key: value}:
            self._store.delete(old)
            return True
        self._store.delete(self.key)
        return False

    def show_until(self, end: threading.Event) -> None:
        """Show life regularly; what goes wrong with that, the next check tells."""
        while not end.wait(self._beat.every_s):
            with suppress(StoreError):
                try:
                    self.show()
                except Conflict:
                    return

    def give_back(self) -> None:
        """Remove the turn's object; its silence would do as well."""
        with suppress(StoreError):
            if self._is_mine(_read(self._store)):
                self._store.delete(self.key)

    def _is_mine(self, there: Mapping[str, bytes]) -> bool:
        """Whether this turn stands, and not a later one to which the number fell anew."""
        return there.get(self.key, b"").startswith(self._token.encode())

    def _value(self, ahead: int = 0) -> bytes:
        return f"{self._token} {self._count + ahead}".encode()


@contextmanager
def taking_turn(store: Store, url: str, beat: Beat) -> Iterator[Turn]:
    """Be the only one who writes to a place, as long as the block lasts. `store` holds nothing but turns.

    Waits for the silence of a writer that was killed. Raises Conflict if there is one that lives.
    """
    silent = _await_silence(store, url, beat)
    turn = Turn(store, 1 + max(map(int, silent), default=0), url=url, beat=beat)
    turn.take()
    try:
        # Whoever looked before this turn was taken, and takes one later, finds it here, or we find theirs.
        if any(silent.get(key) != value for key, value in _read(store).items() if key != turn.key):
            raise Conflict(BUSY.format(url))
        for key in silent:
            store.delete(key)
        end, crew = threading.Event(), Crew("turn", 1)
        crew.submit(turn.show_until, end)
        try:
            yield turn
        finally:
            end.set()
            crew.close()
    finally:
        turn.give_back()


def _await_silence(store: Store, url: str, beat: Beat) -> Mapping[str, bytes]:
    """Return the turns that are there, once they have not changed for long enough. Raises Conflict."""
    found = _read(store)
    until_s = time.monotonic() + beat.silence_s
    while found and time.monotonic() < until_s:
        time.sleep(beat.every_s / _NUM_LOOKS)  # for a change, which is the other writer's word that it lives
        there = _read(store)
        if any(found.get(key) != value for key, value in there.items()):
            raise Conflict(BUSY.format(url))
        found = there
    return found


def _read(store: Store) -> dict[str, bytes]:
    found = {}
    for entry in store.list(""):
        with suppress(NotFound):  # given back since it was listed
            found[entry.key] = bytes(store.read(entry.key)[0])
    return found
