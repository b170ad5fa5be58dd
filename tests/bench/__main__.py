"""Run benchmarks by name, or all of them: `python -m tests.bench [NAME ...] [--quick]`.

Whole runs are written to `results/`, looks (--quick, ONLY=...) under the temporary directory.
Exits 0 whatever the figures are; one that breaks before it has figures is an error, the others still run.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.bench.harness import RESULTS, Effort, Row, draw, missed_last, write_results, written

LOOKS = Path(tempfile.gettempdir()) / f"holdfast-bench-{os.getuid()}"
_LOG_WIDTH = 160


def known_benchmarks() -> list[str]:
    """List the names of the modules `bench_NAME.py` beside this one."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def choose(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the named benchmarks, all if none is named; exit naming the ones there are if one is unknown."""
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    return list(names or known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write and show each benchmark; return the number of those that broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(known_benchmarks())}")
    parser.add_argument("--quick", action="store_true", help="less work, rougher figures")
    options = parser.parse_args(arguments)
    effort = Effort.QUICK if options.quick else Effort.FULL
    directory = LOOKS if options.quick or "ONLY" in os.environ else RESULTS
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)
    missed, broken = dict[str, list[Row]](), 0
    for name in choose(options.names, known_benchmarks()):
        console.print(f"[bold]{name}[/] ({effort.value}) ...")
        try:
            rows: list[Row] = importlib.import_module(f"tests.bench.bench_{name}").run(effort)
        except Exception:  # noqa: BLE001  the border: one broken benchmark does not take the others along
            console.print_exception()
            broken += 1
            continue
        console.print(draw(name, rows))
        console.print(f"written to {write_results(name, rows, directory)}")
        missed[name] = [entry for entry in missed_last(rows) if entry.met is False]
    for name, rows in missed.items():
        for entry in rows:
            console.print(
                f"[red]MISSED[/] {name}: {entry.metric} {written(entry.ours)} {entry.unit}, goal {entry.goal}"
            )
    return broken


if __name__ == "__main__":
    sys.exit(min(main(), 1))
