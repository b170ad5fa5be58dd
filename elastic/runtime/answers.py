"""What to make of Ray's answers, and of its errors: who is lost, who is only silent, and what is nobody's."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    AuthenticationError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    RayError,
    RaySystemError,
    RpcError,
    RuntimeEnvSetupError,
)

from elastic.control.events import Cause, MemberLost, MemberReady, UserFailed
from elastic.runtime.notices import Answer

log = logging.getLogger("holdfast.cluster")
_SILENCE = (ActorUnavailableError, GetTimeoutError, RpcError, ObjectFetchTimedOutError)
_OUR_OWN = (RaySystemError, AuthenticationError, LocalRayletDiedError)  # of this process, not of a member
_MAX_EVIDENCE, _MAX_MESSAGE = 300, 3000


def living(names: Iterable[str], actor_of: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Yield named actors with their handles; one that Ray names but cannot give is dying, or may be."""
    for name in names:
        try:
            yield name, actor_of(name)
        except (ValueError, RayError) as error:
            log.warning("%s, which an earlier driver left, is taken for lost: %s", name, error)


class Answers:
    """What members of one run answer. Once one has come up in the run's environment, that is no mistake."""

    def __init__(self) -> None:
        self._has_begun = False

    def take(self, member: str, get: Callable[[], Answer]) -> Answer | MemberLost | UserFailed | None:
        """Return what a call to a member gives; None if it cannot be reached now: that is silence, no death.

        An environment in which nobody has come up yet is no better on the next try. Raises what is no
        member's trouble.
        """
        try:
            answer = get()
        except _SILENCE:
            return None
        except RuntimeEnvSetupError as error:
            message = f"Ray cannot set up the environment of {member}: {str(error)[:_MAX_MESSAGE]}"
            if self._has_begun:
                return MemberLost(member, Cause.START_FAILED, message)
            return UserFailed(member, 0, 0, message, "")
        except _OUR_OWN:
            raise
        except RayError as error:
            return MemberLost(member, _cause(error), _evidence(error))
        self._has_begun = self._has_begun or any(isinstance(each, MemberReady) for each in answer.news)
        return answer


def _cause(error: RayError) -> Cause:
    text = str(error)
    if isinstance(error, ActorUnschedulableError) or "creation task" in text or "__init__" in text:
        return Cause.START_FAILED
    is_gone = isinstance(error, NodeDiedError | ObjectLostError) or "node has died" in text
    return Cause.HOST_DIED if is_gone else Cause.PROCESS_DIED


def _evidence(error: RayError) -> str:
    """Take the sentence in which Ray says why, leaving out its general advice."""
    text = " ".join(str(error).split())
    reason = text[text.find("The actor is dead because") :] if "The actor is dead because" in text else text
    return f"Ray: {reason.split(' Some common causes')[0][:_MAX_EVIDENCE]}"
