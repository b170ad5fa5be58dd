"""How many workers a person wants for a run that is under way: a small file beside its journal."""

from pathlib import Path

from elastic.errors import RunGone

NAME = "workers"


def resize(run_dir: Path, workers: int) -> None:
    """Ask for another number of workers at full strength; the driver follows within a second.

    It grows as the cluster has room, and shrinks at a step boundary. The wish outlives the driver.
    Raises RunGone if there is no such run, ValueError if that many is none.
    """
    if not (run_dir / "journal.jsonl").exists():
        raise RunGone(f"no run at {run_dir}: nothing to resize")
    if workers < 1:
        raise ValueError(f"a run has at least one worker, not {workers}: stop it instead")
    draft = run_dir / f"{NAME}.draft"
    draft.write_text(str(workers))
    draft.replace(run_dir / NAME)


class Wish:
    """The driver's side: tells a number of workers that was not told before."""

    def __init__(self, run_dir: Path, workers: int) -> None:
        self._path, self._told = run_dir / NAME, workers

    def news(self) -> int | None:
        """Return the number of workers wanted, if that is news."""
        try:
            wanted = int(self._path.read_text())
        except (OSError, ValueError):
            return None
        if wanted < 1 or wanted == self._told:
            return None
        self._told = wanted
        return wanted
