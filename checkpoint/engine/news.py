"""The notice board of a host: what became of its snapshots, for all who read there."""

import threading
from collections import deque
from collections.abc import Callable

from checkpoint.engine.contract import Outcome

_MAX_UNREAD = 1000

News = deque[Outcome]


class Board:
    """Hands every notice to every reader. Thread-safe."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self._readers: list[News] = []
        self._watchers: list[Callable[[Outcome], None]] = []
        self._is_closed = False

    def subscribe(self) -> News:
        """Return a queue that every later outcome is put into."""
        news: News = deque(maxlen=_MAX_UNREAD)
        with self._told:
            self._readers.append(news)
        return news

    def unsubscribe(self, news: News) -> None:
        """Forget a queue."""
        with self._told:
            self._readers = [reader for reader in self._readers if reader is not news]

    def watch(self, watcher: Callable[[Outcome], None]) -> None:
        """Call somebody with every later outcome, at once: it has to be quick, and not to call back."""
        with self._told:
            self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[Outcome], None]) -> None:
        """Call somebody no more."""
        with self._told:
            self._watchers = [one for one in self._watchers if one != watcher]

    def tell(self, outcome: Outcome) -> None:
        """Put up an outcome."""
        with self._told:
            for news in self._readers:
                news.append(outcome)
            for watcher in self._watchers:
                watcher(outcome)
            self._told.notify_all()

    def tell_one(self, news: News, outcome: Outcome) -> None:
        """Put an outcome into one reader's queue."""
        with self._told:
            news.append(outcome)
            self._told.notify_all()

    def wait(self, news: News, timeout_s: float) -> None:
        """Wait a while for something in the queue."""
        with self._told:
            if not news and not self._is_closed:
                self._told.wait(timeout_s)

    def take(self, news: News) -> tuple[Outcome, ...]:
        """Take what is in the queue."""
        with self._told:
            taken = tuple(news)
            news.clear()
            return taken

    def close(self) -> None:
        """Let who waits go, now and later."""
        with self._told:
            self._is_closed = True
            self._told.notify_all()
