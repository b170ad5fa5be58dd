"""The keeper's process: `python -m checkpoint.keeper`, started by a client in a session of its own."""

import argparse
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from checkpoint.errors import CheckpointError, StoreRefused
from checkpoint.keeper.home import hold_life_lock, remove_home
from checkpoint.keeper.server import Server
from checkpoint.keeper.settings import KeeperConfig, parse_config
from checkpoint.store.open import open_store, probe

log = logging.getLogger("holdfast.keeper")

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20
_COLLECTED_FROM = 20_000  # new objects


def main(arguments: list[str]) -> int:
    """Run a keeper; report through the ready pipe whether it is up."""
    options = _parse(arguments)
    _give_memory_back()
    _collect_seldom()
    config = parse_config(options.config, Path(options.directory))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    with os.fdopen(options.ready_fd, "wb", buffering=0) as ready:
        try:
            life_lock = hold_life_lock(config)
            server = _start(config)
        except (CheckpointError, OSError) as error:
            _report(ready, {"kind": type(error).__name__, "error": str(error)})
            return 1
        _report(ready, {"pid": os.getpid()})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    log.info("keeping run %s on host %s for %s", config.run, config.host, config.store_url)
    is_flushed = server.serve()
    if not is_flushed:
        log.error("ended, NOT everything durable")
        return 1
    log.info("ended, everything durable")
    remove_home(config, life_lock)
    return 0


def _report(ready: BinaryIO, told: dict[str, Any]) -> None:
    try:
        ready.write(json.dumps(told).encode())
    except BrokenPipeError:
        log.warning("who started this keeper is gone already")


def _give_memory_back() -> None:
    """Let what encoders free go back to the system at once: glibc would keep some of it for each thread."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _collect_seldom() -> None:
    """Search for cycles less often: records of chunks come and go by the ten thousand, and lie in none."""
    gc.freeze()  # what is imported by now stays
    gc.set_threshold(_COLLECTED_FROM, *gc.get_threshold()[1:])


def _start(config: KeeperConfig) -> Server:
    store = open_store(config.store_url)
    found = probe(store)  # what cannot be used is told now, not at the first checkpoint
    if not (found.is_readable and found.is_writable):
        raise StoreRefused(found.problem)
    if found.problem:
        log.warning("%s", found.problem)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(FileNotFoundError):
        config.socket_path.unlink()
    listener.bind(str(config.socket_path))
    server = Server(config, store, listener)
    listener.listen(128)
    return server


def _parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="python -m checkpoint.keeper", description=__doc__)
    parser.add_argument("--config", required=True, help="KeeperConfig as JSON")
    parser.add_argument("--directory", required=True, help="private directory for socket, locks and log")
    parser.add_argument("--ready-fd", required=True, type=int, help="file descriptor to report on when up")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
