"""Where errors go: to the snapshot that they struck, and no further."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint.engine.intake import Intake
from checkpoint.engine.ledger import SnapshotEntry
from checkpoint.errors import CheckpointError

log = logging.getLogger("holdfast.checkpoint")


@contextmanager
def costing(intake: Intake, entry: SnapshotEntry) -> Iterator[None]:
    """Let what goes wrong inside cost this snapshot, and nothing else."""
    try:
        yield
    except CheckpointError as error:
        intake.fail(entry, f"{type(error).__name__}: {error}")
    except Exception as error:
        log.exception("checkpoint of step %d", entry.step)  # a defect must not stop later checkpoints
        intake.fail(entry, f"{type(error).__name__}: {error}")
