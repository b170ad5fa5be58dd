"""What goes wrong in a worker: whom to tell, and which worlds the worker still serves.

What the job, its data or its settings did wrong would happen elsewhere too: it is told once to each driver,
and leaves the worker up, as what its steps had committed is still good to be saved. Whatever else goes wrong
is this machine's, perhaps: the worker is done, and another takes its place.
"""

import logging
import traceback

from checkpoint import Mismatch, NoCheckpoint, Unsupported
from elastic.control.events import MemberFailed, UserFailed, WorldBroken
from elastic.control.instructions import FormWorld
from elastic.control.standing import BLANK
from elastic.errors import JobRejected, ReplicasDiffer
from elastic.training.blame import UserFailure, explain, is_out_of_memory
from elastic.training.ports import Emit

log = logging.getLogger("holdfast.worker")
_THE_USERS = (UserFailure, JobRejected, Mismatch, NoCheckpoint, ReplicasDiffer, Unsupported)


class Failures:
    """What one worker has told of its failures."""

    def __init__(self, member: str, emit: Emit) -> None:
        self._member, self._emit = member, emit
        self._told: list[UserFailed | MemberFailed] = []
        self._was_in_world = False

    def tell(self, error: BaseException) -> None:
        """Tell of the error that is being handled, and ends the worker."""
        if _is_the_users(error):
            self._note(self._blamed(error))
        else:
            log.error("the worker failed", exc_info=error)
            self._note(MemberFailed(self._member, f"{type(error).__name__}: {error}"))

    def survive(self, error: BaseException, generation: int, *, committed: int) -> None:
        """Tell of the error that is being handled, with which this worker left a world, and after which it
        holds the state of so many `committed` steps, or none. Raises what it cannot live on with.
        """
        if not _is_the_users(error):
            raise error
        if self._was_in_world:
            raise RuntimeError(f"what it holds cannot be saved: {error}") from error
        self._was_in_world = True
        self._note(self._blamed(error))
        if committed == BLANK:  # told after the failure, which without a state would be a newcomer's
            self._emit(WorldBroken(self._member, generation, str(error), is_blank=True))

    def may_serve(self, form: FormWorld) -> bool:
        """Return whether to be in a world: where the job has failed, only to save. Tells of it again if not:
        who ordered this cannot have heard of it.
        """
        may_serve = form.only_saves or not self._was_in_world
        if not may_serve:
            self.tell_again()
        return may_serve

    def tell_again(self) -> None:
        """Tell all of it to whoever may not have heard of it."""
        for failed in self._told:
            self._emit(failed)

    def _note(self, failed: UserFailed | MemberFailed) -> None:
        self._told.append(failed)
        self._emit(failed)

    def _blamed(self, error: BaseException) -> UserFailed:
        """Say what no other worker could do better."""
        match error:
            case UserFailure(step=step, traceback=trace):
                message = str(error)
            case _ if isinstance(error, _THE_USERS):
                step, message, trace = 0, str(error), ""
            case _:
                step, message, trace = 0, explain(error), traceback.format_exc()
        return UserFailed(self._member, 0, step, message, trace)


def _is_the_users(error: BaseException) -> bool:
    """Whether another worker would fare alike; who exits or panics does what it was written to do."""
    return isinstance(error, _THE_USERS) or is_out_of_memory(error) or not isinstance(error, Exception)
