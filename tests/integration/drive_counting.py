"""Drives one run, and tells how many references to Ray's objects are left when Ray is shut down."""

import gc
import sys
from typing import Any

import ray

from tests.integration import drive

_shutdown = ray.shutdown


def _counted() -> None:
    worker: Any = ray._private.worker.global_worker
    counts = worker.core_worker.get_all_reference_counts()
    sys.stderr.write(f"references left: {len(counts)}\n")
    _shutdown()


if __name__ == "__main__":
    gc.disable()  # else chance decides
    ray.shutdown = _counted
    drive.main()
