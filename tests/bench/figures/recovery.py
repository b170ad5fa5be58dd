"""What a failure costs: a worker that is killed, alone or with its node, or falls silent; with a standby.

Four workers train the default job; the victim is the last one, at a step that no checkpoint holds. The peers
train the same job (see restarts). Rounds are interleaved; figures are medians.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tests.bench.figures.restarts import Peer, Restart, peers_of_a_kill, peers_of_a_lost_node
from tests.bench.figures.runs import Blow, Recovery, recover
from tests.bench.figures.session import console
from tests.bench.harness import Effort, Goal, Row, row

Theirs = Mapping[str, Sequence[Restart]]
_TIMES_FASTER = {"Ray Train": 15, "torchrun": 7, "torchft": 6, "torchft, timeouts 1 s": 1.5}
_TIMES_FASTER_NODE = {"Ray Train": 50}


def killed(effort: Effort) -> list[Row]:
    """A worker is SIGKILLed; a cold replacement takes its place."""
    ours, theirs = _in_turn(effort, Blow.KILL, peers_of_a_kill())
    return [
        row("step of the default job, world of 4 on Ray", "s", ours=_step_s(ours)),
        *_next_rows("kill -> next committed step", ours, theirs, _TIMES_FASTER),
        row("kill -> first survivor's error", "s", ours=median(each.detect_s for each in ours)),
        row(
            "first survivor's error -> all survivors know",
            "s",
            ours=median(each.know_s for each in ours),
            goal=Goal("<=", 0.1),
        ),
        row(
            "first survivor's error -> all have left (each ends its micro-batch)",
            "s",
            ours=median(each.leave_s for each in ours),
        ),
        row(
            "last survivor has left -> new group",
            "s",
            ours=median(each.regroup_s for each in ours),
            goal=Goal("<=", 0.2),
        ),
        row(
            "kill -> full strength, cold replacement",
            "s",
            ours=_full_s(ours),
            peers=_next_s(theirs, "Ray Train"),
            goal=Goal("<=", 1, of="ratio"),
        ),
        row(
            "committed steps computed again",
            "steps",
            ours=max(each.redone_steps for each in ours),
            peers={name: median(each.redone_steps for each in told) for name, told in theirs.items()},
            goal=Goal("<=", 0),
        ),
    ]


def standby(effort: Effort) -> list[Row]:
    """A worker is SIGKILLed, and a warm standby takes its place."""
    ours, _ = _in_turn(effort, Blow.KILL_BESIDE_A_STANDBY, {})
    goal = Goal("<=", 0.5 + 1.5 * _step_s(ours))
    return [row("kill -> full strength, warm standby (first step after)", "s", ours=_full_s(ours), goal=goal)]


def stopped(effort: Effort) -> list[Row]:
    """A worker is SIGSTOPped: no socket tells of it."""
    ours, _ = _in_turn(effort, Blow.STOP, {})
    goal = Goal("<=", 0.3 + 5 * _step_s(ours))
    next_s = median(each.next_step_s for each in ours)
    return [row("SIGSTOP -> next committed step, against 5 steps + 0.3 s", "s", ours=next_s, goal=goal)]


def node(effort: Effort) -> list[Row]:
    """A worker's raylet and all processes of its node are SIGKILLed; there is no other node to replace it."""
    ours, theirs = _in_turn(effort, Blow.NODE, peers_of_a_lost_node())
    return _next_rows("node lost -> next committed step", ours, theirs, _TIMES_FASTER_NODE)


def _next_rows(
    metric: str, ours: Sequence[Recovery], theirs: Theirs, times_faster: Mapping[str, float]
) -> list[Row]:
    """Compare with each peer, and with what the step's time allows; a missing peer is a missed goal."""
    next_s = median(each.next_step_s for each in ours)
    beside = [
        row(
            f"{metric}, beside {peer}",
            "s",
            ours=next_s,
            peers=_next_s(theirs, peer),
            goal=Goal("<=", 1 / times, of="ratio"),
        )
        for peer, times in times_faster.items()
    ]
    bound = Goal("<=", 0.3 + 1.5 * _step_s(ours))
    return [row(f"{metric}, against 0.3 s + 1.5 steps", "s", ours=next_s, goal=bound), *beside]


def _in_turn(
    effort: Effort, blow: Blow, peers: Mapping[str, Peer]
) -> tuple[list[Recovery], dict[str, list[Restart]]]:
    """Let us and each peer have a turn in each round."""
    ours: list[Recovery] = []
    theirs: dict[str, list[Restart]] = {name: [] for name in peers}
    for _ in range(1 if effort is Effort.QUICK else 5):
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
            ours.append(recover(Path(directory) / "ours", blow))
            console.print(f"    {blow.value}: {ours[-1]}")
            for number, (name, peer) in enumerate(peers.items()):
                theirs[name].append(peer(Path(directory) / str(number)))
                console.print(f"    {blow.value}, {name}: {theirs[name][-1]}")
    return ours, theirs


def _next_s(theirs: Theirs, peer: str) -> dict[str, float]:
    return {peer: median(each.next_step_s for each in theirs[peer])} if theirs.get(peer) else {}


def _full_s(ours: Sequence[Recovery]) -> float:
    return median(each.full_strength_s for each in ours)


def _step_s(ours: Sequence[Recovery]) -> float:
    return median(each.step_s for each in ours)
