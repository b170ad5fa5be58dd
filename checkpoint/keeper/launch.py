"""Starting a keeper: in its own session, a child of init, so that nothing that ends the trainer ends it."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.errors import (
    ArenaFull,
    CheckpointError,
    KeeperBusy,
    KeeperLost,
    Mismatch,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.keeper.settings import KeeperConfig, config_to_text

_ROOT = Path(__file__).resolve().parents[2]  # from where `-m checkpoint.keeper` finds this very package
_FORK_AND_RUN = (
    "import os, sys\n"
    "if os.fork():\n"
    "    os._exit(0)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'checkpoint.keeper', *sys.argv[1:]])\n"
)
_KINDS: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (Mismatch, StoreRefused, StoreUnavailable, ArenaFull, KeeperBusy, KeeperLost)
}
_LOG_TAIL_BYTES = 2000


def launch(config: KeeperConfig) -> int:
    """Start a keeper and wait until it listens; return its process id.

    Raises what kept it from starting (StoreUnavailable, ArenaFull, ...), KeeperLost for anything else.
    """
    reading, writing = os.pipe()
    with open(config.log_path, "ab") as log, os.fdopen(reading, "rb") as report:
        command = [
            *(sys.executable, "-c", _FORK_AND_RUN),
            *("--config", config_to_text(config)),
            *("--directory", str(config.home.resolve())),
            *("--ready-fd", str(writing)),
        ]
        try:
            starter = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        starter.wait(timeout=config.start_s)
        if not select.select([report], [], [], config.start_s)[0]:
            raise KeeperLost(f"no keeper came up within {config.start_s:.0f} s: see {config.log_path}")
        told = report.read()
    if not told:
        raise KeeperLost(f"the keeper died while starting, its log ends: {_tail(config.log_path)}")
    answer = json.loads(told)
    if "error" in answer:
        raise as_told(answer)
    return int(answer["pid"])


def as_told(answer: Mapping[str, Any]) -> CheckpointError:
    """Return the error that a keeper told, of its kind."""
    return _KINDS.get(answer["kind"], KeeperLost)(answer["error"])


def _tail(path: Path) -> str:
    return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
