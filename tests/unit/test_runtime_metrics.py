"""What a run's metrics count. Ray's own, which need a cluster, are stood in for."""

from typing import ClassVar

import pytest

from elastic.control.events import Cause, MemberLost
from elastic.control.instructions import KillMember, ReleaseMember
from elastic.runtime import metrics
from elastic.runtime.metrics import Metrics


class Counted:
    """A metric that keeps what it is told."""

    all: ClassVar[dict[str, "Counted"]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self.told: list[tuple[float, dict[str, str]]] = []
        self.all[name] = self

    def inc(self, number: float, tags: dict[str, str]) -> None:
        self.told.append((number, tags))


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Counted:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Counted)
    return Counted("none yet")


def test_who_was_ended_counts_as_lost_by_the_cause_and_nobody_counts_twice(lost):
    seen = Metrics("run")
    for entry in (
        MemberLost("w0", Cause.PROCESS_DIED, "its connection to the driver ended"),
        KillMember("w1", "has not answered", Cause.HUNG),
        KillMember("w2", "no room", Cause.FAILED),
        KillMember("w0", "told before it died that it failed", Cause.FAILED),
        ReleaseMember("w3", "it is not needed any more"),
    ):
        seen.see(entry)
    causes = [(number, tags["cause"]) for number, tags in Counted.all["holdfast_members_lost"].told]
    assert causes == [(1, "process died"), (1, "hung"), (1, "worker failed")]
