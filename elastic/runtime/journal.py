"""The run's journal: every event, decision and blow as a line of JSON, appended as it happens; a report is
computed from it.
"""

import errno
import json
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic.control import events, instructions
from elastic.control.report import Moment, TrainReport, build_report
from elastic.errors import RunGone

log = logging.getLogger("holdfast.driver")
NAME = "journal.jsonl"
MAX_UNWRITTEN = 100_000
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for module in (events, instructions)
    for kind in vars(module).values()
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
}
_ENUMS: dict[str, type[Any]] = {"cause": events.Cause, "ending": events.Ending, "manner": instructions.Manner}


class Journal:
    """Appends moments to `run_dir/journal.jsonl`.

    One writer; a torn last line (a killed driver) is skipped by readers. What the disk does not take is kept
    in memory (bounded; the oldest go first) and written before the next moment; recording never raises.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / NAME).open("ab", buffering=0)
        self._is_torn = self._file.tell() > 0
        self._unwritten: deque[bytes] = deque(maxlen=MAX_UNWRITTEN)
        self._is_failing = False
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
        self._unwritten.append(json.dumps(line, default=_plain, separators=(",", ":")).encode() + b"\n")
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
        if self._unwritten:
            log.error(
                "the journal lacks its last %d moments: the disk did not take them", len(self._unwritten)
            )
        with suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """Write what is unwritten, as far as the disk takes it."""
        try:
            while self._unwritten:
                self._write_first()
        except OSError as error:
            if not self._is_failing:
                log.warning("the journal cannot be written and is kept in memory for now: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False

    def _write_first(self) -> None:
        """Write the first unwritten line, on a line of its own. Raises OSError if it does not fit."""
        line = b"\n" + self._unwritten[0] if self._is_torn else self._unwritten[0]
        self._is_torn = True  # until all of it is there
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, "only a part of a line could be written")
        self._is_torn = False
        self._unwritten.popleft()


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
