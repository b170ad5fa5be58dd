"""Keeps a local Ray cluster for one run in a session of its own, so that it outlives the flow process, but
never its lease.

Run as a script, with DIR NUM_CPUS NUM_GPUS LEASE_S (so it imports nothing of ours, and is up soon). It writes
DIR/address once Ray is up, and ends Ray and itself when DIR/lease has not been touched for LEASE_S, when the
node is dead, or at SIGTERM. Ray's own processes follow their driver, which is this process, into death.
"""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray

CHECK_S = 1.0
ADDRESS, LEASE = "address", "lease"


def keep(directory: Path, *, num_cpus: int, num_gpus: int, lease_s: float) -> None:
    """Start Ray, publish its address, and wait until the lease runs out or somebody asks for the end."""
    is_over = threading.Event()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    lease = directory / LEASE
    publish(directory / ADDRESS, ray.get_runtime_context().gcs_address)
    while not is_over.wait(CHECK_S):
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
        if time.time() - lease.stat().st_mtime > lease_s or not any(node["Alive"] for node in nodes):
            break
    (directory / ADDRESS).unlink(missing_ok=True)
    ray.shutdown()


def publish(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or nothing."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), num_cpus=int(sys.argv[2]), num_gpus=int(sys.argv[3]), lease_s=float(sys.argv[4]))
