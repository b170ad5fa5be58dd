"""A trainer process to be killed: gives its keeper snapshots that are for memory only, and says which."""

import sys
from pathlib import Path

from checkpoint import KeeperConfig, connect
from tests.fault.checkpoint_shares import give, handling, rows_of
from tests.fault.checkpoint_worlds import MIB


def main(directory: str) -> None:
    """Capture steps for ever; append to the diary what was captured."""
    root = Path(directory)
    config = KeeperConfig(
        "run", "h0", str(root / "store"), arena_bytes=4 * MIB, lease_s=20, hold=2, directory=root / "keeper"
    )
    host = connect(config)
    with open(root / "diary", "w", buffering=1, encoding="utf-8") as diary:
        for step in range(1, 1_000_000):
            give(host, step, rows_of(step), handling("memory"), name="h0")
            host.outcomes()
            diary.write(f"{step}\n")


if __name__ == "__main__":
    main(sys.argv[1])
