"""A trainer process to be killed: saves at every step through a keeper, and says what it has done."""

import json
import sys
from pathlib import Path

from checkpoint import KeeperConfig, Saver, Share, connect
from tests.fault.checkpoint_worlds import MIB, durable_steps, small_state


def main(directory: str, rank: int, size: int) -> None:
    """Save steps for ever; append to the rank's diary what was captured and what was acknowledged."""
    root = Path(directory)
    config = KeeperConfig(
        "run", "h0", str(root / "store"), arena_bytes=8 * MIB, lease_s=0.5, directory=root / "keeper"
    )
    host = connect(config)
    saver = Saver(host, "run")
    with open(root / f"diary{rank}", "w", buffering=1, encoding="utf-8") as diary:
        for step in range(1, 1_000_000):
            saver.save(step, small_state(step), Share(1, rank, size, ("h0",) * size), {})
            saver.wait_captured()
            diary.write(json.dumps({"captured": step}) + "\n")
            for durable in durable_steps(saver.outcomes()):
                diary.write(json.dumps({"durable": durable}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
