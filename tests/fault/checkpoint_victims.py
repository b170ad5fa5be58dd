"""Runs that are broken off at one write: which there are, and processes that are killed at each of them."""

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoint import Store, open_store
from tests.fault.checkpoint_scenarios import SCENARIOS, Stores
from tests.wrapped_stores import Death, Fault, Faulty, Lost, Metered, Struck

PLACES = ("near", "other", "far")
STRUCK: tuple[Struck, ...] = ("write", "delete")
Acknowledged = dict[str, set[int]]
Open = Callable[[str], Store]  # by the name of a directory


@dataclass(frozen=True, slots=True)
class Point:
    """The `nth` write or delete of a place."""

    place: str
    verb: Struck
    nth: int


def stores_of(root: Open, wrapped: Callable[[str, Store], Store]) -> Stores:
    """Open the stores of a run as its hosts see them."""
    near, far = root("near"), root("far")
    return Stores(wrapped("near", near), wrapped("other", near), wrapped("far", far), near)


def stores_struck(root: Open, point: Point, faults: Sequence[Fault]) -> Stores:
    """Open the stores of a run, one of which breaks."""
    return stores_of(root, lambda place, store: Faulty(store, faults) if place == point.place else store)


def live(scenario: str, stores: Stores, generation: int = 0) -> Acknowledged:
    """Live through a scenario; return which steps were acknowledged on which tier."""
    acknowledged: Acknowledged = defaultdict(set)
    SCENARIOS[scenario](stores, lambda tier, step: acknowledged[tier].add(step), generation)
    return acknowledged


def points_of(scenario: str, root: Open) -> list[Point]:
    """Run a scenario undisturbed, and list every moment at which it can be broken off."""
    metered: dict[str, Metered] = {}

    def count(place: str, store: Store) -> Store:
        metered[place] = Metered(store)
        return metered[place]

    acknowledged = live(scenario, stores_of(root, count))
    assert acknowledged, "nothing can be lost where nothing was acknowledged"
    points = []
    for place in PLACES:
        for verb in STRUCK:
            points += [Point(place, verb, nth + 1) for nth in range(_num_calls(metered[place], verb))]
    return points


def _num_calls(metered: Metered, struck: Struck) -> int:
    """Return how many calls of a verb there were, or of both that write."""
    calls = metered.traffic().num_calls
    return sum(calls.get(verb, 0) for verb in (("put", "put_new") if struck == "write" else (struck,)))


def lost_from(point: Point, num_more: int = 200) -> list[Fault]:
    """Return the faults of a store that dies at a point, and stays dead for all that writes."""
    if point.verb == "delete":
        return [Lost("delete", nth) for nth in range(point.nth, point.nth + num_more)]
    writes: list[Fault] = [Lost("write", nth) for nth in range(point.nth, point.nth + num_more)]
    return writes


def _in_child(act: Callable[[], object]) -> int:
    """Fork, while this process has no threads; return how the child ended."""
    if (pid := os.fork()) == 0:
        act()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def _die(scenario: str, root: Path, point: Point) -> None:
    """Live through a scenario, noting what is acknowledged, and be killed at a point; or never get there."""
    struck: list[Metered] = []

    def note(tier: str, step: int) -> None:
        with open(root / "acknowledged", "a", encoding="utf-8") as file:
            file.write(f"{tier} {step}\n")

    def strike(place: str, store: Store) -> Store:
        if place != point.place:
            return store
        struck.append(Metered(store))
        return Faulty(struck[0], [Death(point.verb, point.nth)])

    SCENARIOS[scenario](stores_of(lambda name: open_store(str(root / name)), strike), note, 0)
    num_calls = _num_calls(struck[0], point.verb)
    assert num_calls < point.nth, f"{point} was passed alive: there were {num_calls} calls"


def acknowledged_in(root: Path) -> Acknowledged:
    """Read what a victim had been told."""
    told: Acknowledged = defaultdict(set)
    path = root / "acknowledged"
    for line in path.read_text().splitlines() if path.exists() else ():
        tier, step = line.split()
        told[tier].add(int(step))
    return told


def main(directory: str, scenario: str) -> None:
    """Kill a process at every point of a scenario; leave points.json, and a directory for each by number."""
    root = Path(directory)

    def list_points() -> None:
        points = points_of(scenario, lambda name: open_store(str(root / "dry" / name)))
        (root / "points.json").write_text(json.dumps([asdict(point) for point in points]))

    if _in_child(list_points):
        sys.exit("the undisturbed run failed")
    survived = []
    for number, fields in enumerate(json.loads((root / "points.json").read_text())):
        home, point = root / str(number), Point(**fields)
        home.mkdir()
        status = _in_child(lambda home=home, point=point: _die(scenario, home, point))  # type: ignore[misc]
        if status == 0:
            survived.append(str(point))
        elif not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the run that was to be killed at {point} failed")
    (root / "survived.json").write_text(json.dumps(survived))


if __name__ == "__main__":
    main(*sys.argv[1:])
