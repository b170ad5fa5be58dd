"""A controller whose first world trains, and a clock for it."""

from collections.abc import Collection, Mapping

from elastic.control.controller import Controller
from elastic.control.events import MemberCame, MemberReady, Settled, StepCommitted, Tick, WorldFormed
from elastic.control.instructions import Instruction
from elastic.control.phase import Phase
from elastic.control.policy import WorldPolicy


def training(workers: int = 2) -> Controller:
    """A controller whose first world trains: generation 1, members w0, w1, ..."""
    controller = Controller(WorldPolicy(workers=workers), "w")
    controller.begin((), 0.0)
    for index in range(workers):
        controller.handle(MemberReady(f"w{index}", "h", index), 1.0)
    for index in range(workers):
        controller.handle(Settled(f"w{index}", 1, 0, "fresh", 0.1), 2.0)
    assert controller.phase is Phase.TRAINING
    return controller


def stepping(workers: int = 3) -> Controller:
    """A controller whose members have all made a step of half a second."""
    controller = training(workers)
    for index in range(workers):
        controller.handle(StepCommitted(f"w{index}", 1, 1, 1.0, 0.5, 1, 0.0), 3.0)
    return controller


def tell_all(controller: Controller, *members: str, at: float, settle: bool = True) -> None:
    """Let members come to the newest world, connect, and hold the state."""
    for kind in (MemberCame, WorldFormed, Settled):
        for member in members:
            match kind:
                case _ if kind is MemberCame:
                    controller.handle(MemberCame(member, controller.formed), at)
                case _ if kind is WorldFormed:
                    controller.handle(WorldFormed(member, controller.formed, 0.1), at)
                case _ if settle:
                    controller.handle(Settled(member, controller.formed, 1, "self", 0.1), at)


def pass_time(
    controller: Controller,
    since: float,
    until: float,
    *,
    silent: Mapping[str, float] | None = None,
    working: Mapping[str, float] | None = None,
    waiting: Collection[str] = (),
) -> list[Instruction]:
    """Tick as a driver does, until something is decided; `silent` and `working` tell since when, `waiting`
    who waits for room.
    """
    for number in range(1, round((until - since) * 10) + 1):
        now = since + 0.1 * number
        silence_s = dict.fromkeys(controller.members.hosts, 0.1)
        silence_s |= {member: now - at for member, at in (silent or {}).items()}
        working_s = {member: now - at for member, at in (working or {}).items()}
        if decided := controller.handle(Tick(silence_s, working_s, frozenset(waiting)), now):
            return decided
    return []
