"""The border to the user's code: what it raises becomes one kind of failure, told apart from a world's."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from elastic.errors import JobRejected
from elastic.training.ports import Broken


class UserFailure(Exception):
    """The job's own code raised, in one step and virtual rank (-1: outside of any). Carries text only."""

    def __init__(self, step: int, virtual_rank: int, what: str, trace: str) -> None:
        place = f"in step {step}, virtual rank {virtual_rank}" if virtual_rank >= 0 else f"at step {step}"
        super().__init__(f"the job failed {place}: {what}")
        self.step = step
        self.virtual_rank = virtual_rank
        self.traceback = trace


@contextmanager
def blaming_the_job(step: int, virtual_rank: int = -1) -> Iterator[None]:
    """Turn whatever the job's code raises into UserFailure. Inside of a sharded model a world may break."""
    try:
        yield
    except (Broken, JobRejected, UserFailure):
        raise
    except Exception as error:  # noqa: BLE001  (this is the border to the user's code)
        raise UserFailure(
            step, virtual_rank, f"{type(error).__name__}: {error}", traceback.format_exc()
        ) from None
