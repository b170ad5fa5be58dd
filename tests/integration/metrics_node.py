"""A Ray node on which a run tells its metrics until standard input ends; it prints its endpoint."""

import sys

import ray

from elastic.control.events import Cause, CheckpointDurable, MemberLost, StepCommitted
from elastic.control.instructions import FormWorld, Manner
from elastic.runtime.metrics import Metrics


def main() -> None:
    """Tell of a world of two, a step, a checkpoint and a loss."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    nodes = ray.nodes()
    metrics = Metrics("r")
    metrics.see(FormWorld(7, ("a", "b"), ("here", "here"), Manner.AT_ONCE, "because"))
    for member in ("a", "b"):
        metrics.see(StepCommitted(member, 7, 3, 2.5, 0.5, 100, 0.01))
    metrics.see(CheckpointDurable("a", 7, 3, "store", 10, 1.0))
    metrics.see(MemberLost("b", Cause.PROCESS_DIED, "its lifeline"))
    sys.stdout.write(f"http://127.0.0.1:{nodes[0]['MetricsExportPort']}/metrics\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
