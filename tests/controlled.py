"""A controller whose first world trains, and a clock for it."""

from collections.abc import Mapping

from elastic.control.controller import Controller, Phase
from elastic.control.events import MemberReady, Settled, Tick
from elastic.control.instructions import Instruction
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


def pass_time(
    controller: Controller,
    since: float,
    until: float,
    *,
    silent: Mapping[str, float] | None = None,
    working: Mapping[str, float] | None = None,
) -> list[Instruction]:
    """Tick as a driver does, until something is decided; `silent` and `working` tell since when."""
    for number in range(1, round((until - since) * 10) + 1):
        now = since + 0.1 * number
        silence_s = dict.fromkeys(controller.members.hosts, 0.1)
        silence_s |= {member: now - at for member, at in (silent or {}).items()}
        working_s = {member: now - at for member, at in (working or {}).items()}
        if decided := controller.handle(Tick(silence_s, working_s), now):
            return decided
    return []
