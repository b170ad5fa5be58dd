"""Which world forms next, and why: one pure decision over who is there."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain, islice

from elastic.control.standbys import num_standbys


@dataclass(frozen=True, slots=True)
class WorldPolicy:
    """How large a world may be and how patient its forming is.

    Besides the `workers` of a world, `standbys` are kept ready: started, and idle until somebody is lost; if
    `standbys_follow` a wish for another number of workers, as many as suffice for that.
    Where nobody holds any state the next world waits `gather_s` for all `workers`; after a failure the
    survivors go on at once if they are at least `min_workers`. For fewer than these the first world waits
    `gather_s`, every other one `wait_s`, and both `start_s` for whoever is up and makes its dataset. More
    than `max_failures` member losses end the run, and so do more than twice as many as it has workers, and
    three, in a row without a committed step between them.

    A member whose process does not answer hangs if it is silent for `hang_floor_s` (longer where longer
    pauses are usual) and no step was committed for `hang_factor` times what one takes; while a world forms,
    after `reforming_s`, or `forming_s` as long as nobody holds any state; and wherever it is and whatever the
    others do, after `unreachable_s`. Where several are silent and nobody answers, the driver may be cut off:
    they get `alone_s`, in which they save and end without it. A member is stuck in a micro-batch of
    `work_floor_s` (longer where longer ones are usual) that others wait for. An earlier driver's member
    answers within `found_s` (and `roll_s` after a request to stop), a new one within `start_s`, or it is
    replaced.

    Where all processes answer and nothing moves for `roll_s` (longer where that is usual), the roll is
    called: the world forms anew, and who does not come within `late_s` (longer where that is usual), while
    others do, hangs. What has no usual time, a first step or a restore, may take `patience_s`; a last
    checkpoint may take `save_s`. Who waits for room in its host's arena is waited for.
    """

    workers: int
    min_workers: int = 1
    standbys: int = 0
    standbys_follow: bool = False
    gather_s: float = 120.0
    wait_s: float = 300.0
    max_failures: int = 100
    hang_factor: float = 3.0
    hang_floor_s: float = 1.0
    work_floor_s: float = 5.0
    forming_s: float = 30.0
    reforming_s: float = 1.0
    unreachable_s: float = 30.0
    alone_s: float = 120.0
    found_s: float = 30.0
    start_s: float = 600.0
    roll_s: float = 10.0
    late_s: float = 60.0
    patience_s: float = 900.0
    save_s: float = 600.0


def resized(policy: WorldPolicy, workers: int, least: int) -> WorldPolicy:
    """Return the policy of a run that is to have this many workers, and at `least` so many if it can."""
    standbys = num_standbys(workers) if policy.standbys_follow else policy.standbys
    return replace(policy, workers=workers, min_workers=min(least, workers), standbys=standbys)


class Action(Enum):
    """What to do about the world."""

    KEEP = auto()
    FORM = auto()
    WAIT = auto()
    GIVE_UP = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """An action with its reason; `members` are the next world's, in rank order, when the action is FORM.
    Those who are `leaving` are in it to give the others what they hold.
    """

    action: Action
    reason: str
    members: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a world that nobody forms waits for, since `waited_s`: members that are starting, of which those
    `building` are up, and still make their dataset or model. `has_begun`: the run has had a world.
    """

    num_starting: int
    building: Collection[str]
    waited_s: float
    has_begun: bool

    def patience_s(self, policy: WorldPolicy) -> float:
        """How long too few workers are waited for."""
        patience_s = policy.wait_s if self.has_begun else policy.gather_s
        return max(patience_s, policy.start_s) if self.building else patience_s


def choose_world(
    current: Sequence[str], ready: Collection[str], policy: WorldPolicy, waiting: Waiting
) -> Decision:
    """Choose the next world from the `current` one (its living members) and the `ready` ones outside it.

    Members keep their order, so survivors keep low ranks and a joiner, who holds no state, comes last.
    """
    count = min(len(current) + len(ready), policy.workers)
    if count == policy.workers:
        return _form(f"all {policy.workers} workers are there", current, ready, count)
    if current and count >= policy.min_workers:
        return _form(f"{count} of {policy.workers} workers go on", current, ready, count)
    num_starting, waited_s = waiting.num_starting, waiting.waited_s
    if num_starting and not current and waited_s < policy.gather_s:
        return Decision(
            Action.WAIT, f"{count} of {policy.workers} workers are there, {num_starting} are starting"
        )
    if count >= policy.min_workers:
        return _form(f"{count} workers after waiting {waited_s:.0f} s for more", current, ready, count)
    patience_s = waiting.patience_s(policy)
    if waited_s < patience_s:
        return Decision(Action.WAIT, f"{count} workers are too few, {policy.min_workers} are needed")
    what = f"only {count} of at least {policy.min_workers} workers came within {patience_s:.0f} s; "
    if waiting.building:
        slow = ", ".join(sorted(waiting.building))
        return Decision(Action.GIVE_UP, what + f"{slow} still make their dataset or model: make that quicker")
    return Decision(Action.GIVE_UP, what + "give the cluster more resources or lower world.min_workers")


def _form(reason: str, current: Sequence[str], ready: Collection[str], count: int) -> Decision:
    return Decision(Action.FORM, reason, tuple(islice(chain(current, ready), count)))
