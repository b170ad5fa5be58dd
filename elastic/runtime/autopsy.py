"""What a silent process was doing: its Python stacks, if it still answers signals, and its threads as the
kernel sees them.
"""

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

SIGNAL = signal.SIGUSR2
ANSWER_S = 0.5
SETTLE_S = 0.05
_NAME = "holdfast-stacks"


def prepare() -> None:
    """Let this process write its stacks down when it is signalled; works though the interpreter is stuck.

    They go to memory that others read through /proc, so a killed process leaves no file behind.
    """
    faulthandler.register(SIGNAL, os.memfd_create(_NAME), all_threads=True)


def examine(member: str, pid: int) -> str:
    """Describe what a process on this host is doing. Takes half a second at most."""
    return "\n".join([f"{member}, pid {pid}", _threads(pid), "Python:", _stacks(pid)])


def _stacks(pid: int) -> str:
    try:
        path = next(filter(_is_ours, Path(f"/proc/{pid}/fd").iterdir()), None)
        if path is None:
            return "no stacks: the process did not prepare for it"
        os.kill(pid, SIGNAL)
        until, size = time.monotonic() + ANSWER_S, 0
        while time.monotonic() < until:
            time.sleep(SETTLE_S)
            grown = path.stat().st_size
            if grown and grown == size:
                break
            size = grown
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"no stacks: {error}"
    return text or "no stacks: the process does not take signals (it is stopped, or waits in the kernel)"


def _is_ours(descriptor: Path) -> bool:
    with suppress(OSError):  # it was closed meanwhile
        return os.readlink(descriptor).startswith(f"/memfd:{_NAME}")
    return False


def _threads(pid: int) -> str:
    """List the threads with their states and the kernel functions they wait in, as far as that is shown."""
    lines = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            with suppress(OSError):
                fields = (task / "stat").read_text()
                name, _, rest = fields.partition("(")[2].rpartition(")")
                waits_in = (task / "wchan").read_text().strip()
                lines.append(f"  thread {task.name} {name}: state {rest.split()[0]}, waits in {waits_in}")
    return "\n".join(lines) or "  the process is gone"
