"""What a running task says: to its run's log in Prefect, to its progress artifact, and to watchers."""

import logging
import re
import time
from contextlib import AbstractContextManager
from typing import cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.logging.loggers import PrefectLogAdapter, get_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from elastic import Happening, LogLine, Notice, Progress
from tasks.watching import tell

# The driver waits for each update: seldom, briefly, and not at all while the server is away.
_UPDATE_EVERY_S = 3.0
_UPDATE_LIMIT_S = 2.0
_PATIENCE_S = 60.0


def say(kind: str, message: str) -> None:
    """Log one line of the running task and tell it to whoever watches."""
    get_run_logger().info(message)
    tell(Happening(kind, message))


class Herald:
    """Observes a training for Prefect: logs and happenings to the run's log, progress to an artifact."""

    def __init__(self, run: str) -> None:
        # Within a task run it is an adapter, whose extra names the run that its records belong to.
        self._log = cast(PrefectLogAdapter, get_run_logger())
        self._artifact = ProgressArtifact(run)

    def __call__(self, notice: Notice) -> None:
        """Take one notice of the driver, and pass it on."""
        match notice:
            case LogLine(member, level, message):
                self._log_as(member).log(level, message)
            case Happening(kind, message):
                self._log.log(_LEVELS.get(kind, logging.INFO), message)
            case Progress():
                self._artifact.show(notice, time.monotonic())
        tell(notice)

    def _log_as(self, member: str) -> "PrefectLogAdapter":
        """Return a logger under the worker's own name whose records belong to this task run."""
        return PrefectLogAdapter(get_logger(f"task_runs.{member}"), extra=dict(self._log.extra or {}))


_LEVELS = {"failure": logging.WARNING, "lost": logging.WARNING, "checkpoint lost": logging.WARNING}


class ProgressArtifact:
    """A run's progress in the Prefect UI. It never holds the driver up for long, and never fails it."""

    def __init__(self, run: str) -> None:
        self._key = artifact_key("progress", run)
        self._id: UUID | None = None
        self._due_at = float("-inf")

    def show(self, progress: Progress, now: float) -> None:
        """Draw the progress, unless it was drawn a moment ago or the server did not answer lately."""
        is_last = progress.step >= progress.num_steps
        if now < self._due_at and not is_last:
            return
        percent = 100.0 * progress.step / max(1, progress.num_steps)
        try:
            self._draw(percent, describe(progress))
            self._due_at = now + _UPDATE_EVERY_S
        except (httpx.HTTPError, PrefectException, OSError) as error:
            self._due_at = now + _PATIENCE_S
            logging.getLogger(__name__).warning("no progress shown for %.0f s: %s", _PATIENCE_S, error)

    def _draw(self, percent: float, description: str) -> None:
        if self._id is None:
            # Both a function and, in an event loop, a coroutine function; here it is the former.
            self._id = cast(UUID, create_progress_artifact(percent, self._key, description))
            return
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), _client() as client:
            client.update_artifact(self._id, ArtifactUpdate(data=percent, description=description))


def _client() -> AbstractContextManager[SyncPrefectClient]:
    return get_client(httpx_settings={"timeout": _UPDATE_LIMIT_S}, sync_client=True)


def describe(progress: Progress) -> str:
    """Say where a run stands in one line."""
    durable = "none yet" if progress.durable_step < 0 else f"step {progress.durable_step}"
    return (
        f"{progress.phase}: step {progress.step} of {progress.num_steps}, loss {progress.loss:.4f}, "
        f"{progress.tokens_per_s:,.0f} tokens/s, world of {progress.world_size}, "
        f"last durable checkpoint: {durable}"
    )


def artifact_key(kind: str, run: str) -> str:
    """Make the key that the UI lists an artifact under: lower case, digits and dashes."""
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', run.lower()).strip('-')}"
