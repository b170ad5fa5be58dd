"""Who watches runs in this process: the terminal registers here, as a flow's parameters must be plain."""

from collections.abc import Iterator
from contextlib import contextmanager

from elastic import Happening, LogLine, Notice, Observer, Progress

__all__ = ["Happening", "LogLine", "Notice", "Observer", "Progress", "tell", "watching"]

_observers: list[Observer] = []


@contextmanager
def watching(observer: Observer) -> Iterator[None]:
    """Let the observer see every notice of this process's runs while the block lasts."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def tell(notice: Notice) -> None:
    """Pass a notice on to whoever watches."""
    for observer in tuple(_observers):
        observer(notice)
