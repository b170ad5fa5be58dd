"""How much memory this process has used at most, as the system counts it."""

import resource
import sys


def high_water_bytes() -> int:
    """Return the most memory that was resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
