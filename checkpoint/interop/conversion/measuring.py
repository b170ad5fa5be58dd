"""How much memory this process has used at most, as the system counts it."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def high_water_bytes() -> int:
    """Return the most memory that was resident so far."""
    if _STATUS.exists():  # what getrusage tells begins with what the parent had when it forked
        told = dict(line.split(":", 1) for line in _STATUS.read_text("ascii", "replace").splitlines())
        if "VmHWM" in told:
            return int(told["VmHWM"].split()[0]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
