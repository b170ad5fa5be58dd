"""How a run's driver joins a Ray cluster, and what code and environment its workers get there."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication import authentication_token_setup as authentication
from ray.exceptions import RayError

from elastic.errors import TrainingFailed
from elastic.runtime.order import TrainOrder

log = logging.getLogger("holdfast.cluster")
LOOPBACK = "127.0.0.1"


def own_address(order: TrainOrder) -> str:
    """Return the address at which members on this node are reached; a local Ray needs no other node."""
    if order.cluster.address is None:
        return LOOPBACK
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no types here


def connect(address: str, order: TrainOrder) -> None:
    """Join a cluster; Ray replaces the process's SIGTERM handler meanwhile, which is put back.

    A Ray that was started locally demands this user's token, which Ray does not show to an explicit address
    of its own accord.
    """
    handler = signal.getsignal(signal.SIGTERM)
    logging.getLogger(authentication.__name__).setLevel(logging.ERROR)  # it warns of what is the default
    authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(
            address=address,
            namespace=order.run,
            runtime_env=_code(order),
            log_to_driver=False,
            configure_logging=False,
        )
        # Else it prints each lost worker, with general advice.
        ray._private.worker.print_to_stdstream = _log  # type: ignore[assignment]  # Ray names its option
    except (RayError, OSError, RuntimeError) as error:
        raise TrainingFailed(
            f"cannot reach the Ray cluster at {address}: {error}; check world.address"
        ) from error
    finally:
        if handler is not None:
            _restore(handler)


def _log(data: dict[str, Any], **_: object) -> None:
    log.debug("Ray: %s", data.get("lines"))


def _restore(handler: Any) -> None:
    try:
        signal.signal(signal.SIGTERM, handler)
    except ValueError:
        log.debug("not in the main thread: Ray has not touched the handler")


def runtime_env(order: TrainOrder) -> dict[str, Any]:
    """Say what a worker's process finds in its environment."""
    threads = str(order.cluster.threads_per_worker)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if order.cluster.address is None:
        paths = [str(order.job.code_dir), *(path for path in sys.path if Path(path).is_dir())]
        return {"env_vars": {**variables, "PYTHONPATH": os.pathsep.join(paths)}}
    return {"env_vars": variables}


def _code(order: TrainOrder) -> dict[str, Any]:
    """Say what code travels to the nodes of a cluster; Ray uploads it for a driver, not for an actor."""
    if order.cluster.address is None or order.job.path.startswith("elastic."):
        return {}
    return {"working_dir": str(order.job.code_dir), "excludes": ["runs", ".venv", ".git"]}
