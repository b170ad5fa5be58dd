"""What may take minutes, done aside: whoever asks for it lives on meanwhile."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Answer = TypeVar("Answer")
LOOK_S = 0.1


def begun_aside(work: Callable[[], Answer]) -> Future[Answer]:
    """Let a thread of its own do some work, that does not keep the process from ending."""
    answer: Future[Answer] = Future()

    def do() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001  (the thread's border: whoever asked gets it)
            answer.set_exception(error)

    threading.Thread(target=do, name="aside", daemon=True).start()
    return answer


def asked_aside(question: Callable[[], Answer], live_on: Callable[[], None]) -> Answer:
    """Return the answer, or raise the error, of a question that a thread of its own asks.

    Until that is there `live_on` is called again and again; what it raises ends the waiting.
    """
    answer = begun_aside(question)
    while not wait([answer], LOOK_S).done:
        live_on()
    return answer.result()
