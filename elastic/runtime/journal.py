"""The run's journal: every event, decision and blow as a line of JSON, appended as it happens; a report is
computed from it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic.control import events, instructions
from elastic.control.report import Moment, TrainReport, build_report
from elastic.errors import RunGone

NAME = "journal.jsonl"
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for module in (events, instructions)
    for kind in vars(module).values()
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
}
_ENUMS: dict[str, type[Any]] = {"cause": events.Cause, "ending": events.Ending, "manner": instructions.Manner}


class Journal:
    """Appends moments to `run_dir/journal.jsonl`.

    One writer; a torn last line (a killed driver) is skipped by readers.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / NAME).open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")
        self._written: set[tuple[int, int]] = set()

    def record(self, at: float, entry: events.Entry | instructions.Instruction) -> None:
        """Append one moment; ticks, and the same step told by further ranks, are left out."""
        if isinstance(entry, events.Tick):
            return
        if isinstance(entry, events.StepCommitted):
            key = (entry.generation, entry.step)
            if key in self._written:
                return
            self._written.add(key)
        line = {"t": round(at, 6), "kind": type(entry).__name__, **asdict(entry)}
        self._file.write(json.dumps(line, default=_plain, separators=(",", ":")) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_moments(run_dir: Path) -> Iterator[Moment]:
    """Yield the journal's moments in order; lines that are no moments are skipped."""
    path = run_dir / NAME
    if not path.exists():
        raise RunGone(f"no journal at {path}: this run never started training")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            moment = _decode(line)
            if moment is not None:
                yield moment


def read_report(run_dir: Path) -> TrainReport:
    """Compute the training part of the report of the run in `run_dir`. Raises RunGone if it never started."""
    return build_report(run_dir.name, list(read_moments(run_dir)))


def _plain(value: object) -> object:
    return value.value if isinstance(value, instructions.Manner) else str(value)


def _decode(line: str) -> Moment | None:
    try:
        record = json.loads(line)
        kind = _KINDS[record["kind"]]
        names = {each.name for each in fields(kind)}
        values = {name: _typed(name, value) for name, value in record.items() if name in names}
        return Moment(float(record["t"]), kind(**values))
    except (ValueError, KeyError, TypeError):
        return None


def _typed(name: str, value: object) -> object:
    if name in _ENUMS:
        return _ENUMS[name](value)
    return tuple(value) if isinstance(value, list) else value
