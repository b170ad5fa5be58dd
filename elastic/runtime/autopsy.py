"""What a silent process was doing: its Python stacks, if it still answers signals, and its threads as the
kernel sees them.
"""

import faulthandler
import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

SIGNAL = signal.SIGUSR2
ANSWER_S = 0.5
SETTLE_S = 0.05


def prepare(run: str, member: str) -> None:
    """Let this process write its stacks down when it is signalled; works though the interpreter is stuck."""
    path = _path(run, member)
    path.unlink(missing_ok=True)
    faulthandler.register(SIGNAL, path.open("xb", buffering=0), all_threads=True)
    path.chmod(0o600)


def examine(run: str, member: str, pid: int) -> str:
    """Describe what a process on this host is doing. Takes half a second at most."""
    return "\n".join([f"{member}, pid {pid}", _threads(pid), "Python:", _stacks(run, member, pid)])


def _path(run: str, member: str) -> Path:
    return Path(tempfile.gettempdir()) / f"holdfast-{os.getuid()}-{run}-{member}.stacks"


def _stacks(run: str, member: str, pid: int) -> str:
    path = _path(run, member)
    try:
        os.kill(pid, SIGNAL)
        until, size = time.monotonic() + ANSWER_S, 0
        while time.monotonic() < until:
            time.sleep(SETTLE_S)
            grown = path.stat().st_size
            if grown and grown == size:
                break
            size = grown
        text = path.read_text(errors="replace")
        path.unlink()
    except OSError as error:
        return f"no stacks: {error}"
    return text or "no stacks: the process does not take signals (it is stopped, or waits in the kernel)"


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
