"""Ends silent members, each once it is written down what it was doing: in threads, as that takes a while."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MAX_AUTOPSIES = 4  # at a time


class Autopsies:
    """What is under way, and what waits for its turn."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_AUTOPSIES, thread_name_prefix="autopsy")
        self._is_called_off = threading.Event()

    def begin(self, examine: Callable[[], None], end: Callable[[], None]) -> None:
        """Examine somebody when there is a thread for it, then end it whatever came of that."""
        self._threads.submit(self._run, examine, end)

    def call_off(self) -> None:
        """End nobody any more: another driver may have them by now."""
        self._is_called_off.set()

    def close(self) -> None:
        """Wait until all that was begun is over."""
        self._threads.shutdown()

    def _run(self, examine: Callable[[], None], end: Callable[[], None]) -> None:
        if self._is_called_off.is_set():
            return
        try:
            examine()
        finally:
            if not self._is_called_off.is_set():
                end()
