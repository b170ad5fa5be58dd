"""Notices that a process or its machine will be taken away: SIGTERM to a worker, and Ray's draining of a
node.
"""

import logging
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

import ray
from ray.exceptions import RayError

from elastic.runtime.placement import HOST_LENGTH

log = logging.getLogger("holdfast.worker")
LOOK_EVERY_S = 1.0


def heed_sigterm(told: Callable[[], None]) -> None:
    """Call `told` at the first SIGTERM instead of dying; the second one ends the process as ever."""

    def heed(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        told()

    try:
        signal.signal(signal.SIGTERM, heed)
    except ValueError:
        log.warning("not in the main thread: SIGTERM will end this worker without a hand-over")


class Draining:
    """Tells once of each node that Ray drains."""

    def __init__(self) -> None:
        self._told: frozenset[str] = frozenset()
        self._looked_at = time.monotonic()

    @property
    def hosts(self) -> frozenset[str]:
        """The nodes that were being drained when Ray was last asked, as the members' hosts."""
        return frozenset(node[:HOST_LENGTH] for node in self._told)

    def news(self) -> Mapping[str, str]:
        """Return the nodes whose draining is news, as the members' hosts, and what is known of it."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return {}
        self._looked_at = now
        try:
            nodes: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
        except (RayError, OSError) as error:
            log.debug("which nodes Ray drains is not known for now: %s", error)
            return {}
        fresh = {node[:HOST_LENGTH]: deadline for node, deadline in nodes.items() if node not in self._told}
        self._told = self._told | nodes.keys()  # anew: other threads read it
        return {node: _notice(deadline_ms) for node, deadline_ms in fresh.items()}


def _notice(deadline_ms: int) -> str:
    if not deadline_ms:
        return "Ray drains its node"
    return f"Ray drains its node within {max(0.0, deadline_ms / 1e3 - time.time()):.0f} s"
