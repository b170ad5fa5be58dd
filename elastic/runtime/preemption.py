"""Notices that a process or its machine will be taken away: SIGTERM to a worker, and Ray's draining of a
node.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from math import inf
from types import FrameType

import ray
from ray.exceptions import RayError

from elastic.runtime.placement import HOST_LENGTH

log = logging.getLogger("holdfast.worker")
LOOK_EVERY_S = 1.0


def heed_sigterm(told: Callable[[], None]) -> None:
    """Call `told` at the first SIGTERM instead of dying; the second one ends the process as ever, and the
    first one a child that the job forked.
    """
    worker = os.getpid()

    def heed(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == worker:
            told()
        else:
            signal.raise_signal(number)

    try:
        signal.signal(signal.SIGTERM, heed)
    except ValueError:
        log.warning("not in the main thread: SIGTERM will end this worker without a hand-over")


def _ask_ray() -> Mapping[str, int]:
    """Return the nodes that Ray drains, and until when (Unix milliseconds; 0: that is not known)."""
    nodes: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes


class Draining:
    """Tells once of each node that Ray drains, and at any time whether it does."""

    def __init__(self, ask: Callable[[], Mapping[str, int]] = _ask_ray) -> None:
        self._ask = ask
        self._notices: Mapping[str, str] = {}  # by host; made anew with each change, as other threads read it
        self._looked_at = -inf

    @property
    def hosts(self) -> frozenset[str]:
        """The nodes that were being drained when Ray was last asked, as the members' hosts."""
        return frozenset(self._notices)

    def notice(self, host: str) -> str | None:
        """Return what was known of this host's draining when Ray was last asked; None: nothing."""
        return self._notices.get(host)

    def news(self) -> Mapping[str, str]:
        """Return the nodes whose draining is news, as the members' hosts, and what is known of it."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return {}
        self._looked_at = now
        try:
            nodes = self._ask()
        except (RayError, OSError) as error:
            log.debug("which nodes Ray drains is not known for now: %s", error)
            return {}
        known = self._notices
        fresh = {node[:HOST_LENGTH]: _notice(deadline_ms) for node, deadline_ms in nodes.items()}
        fresh = {host: notice for host, notice in fresh.items() if host not in known}
        self._notices = {**known, **fresh}
        return fresh


def _notice(deadline_ms: int) -> str:
    if not deadline_ms:
        return "Ray drains its node"
    return f"Ray drains its node within {max(0.0, deadline_ms / 1e3 - time.time()):.0f} s"
