"""The keeper's process: `python -m checkpoint.keeper`, started by a client in a session of its own."""

import argparse
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoint.errors import CheckpointError, KeeperLost, StoreRefused
from checkpoint.keeper.server import Server
from checkpoint.keeper.settings import KeeperConfig
from checkpoint.store.open import open_store, probe

log = logging.getLogger("holdfast.keeper")


def main(arguments: list[str]) -> int:
    """Run a keeper; report through the ready pipe whether it is up."""
    options = _parse(arguments)
    config = KeeperConfig(**json.loads(options.config), directory=Path(options.directory))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    with os.fdopen(options.ready_fd, "w", encoding="utf-8") as ready:
        try:
            server = _start(config)
        except (CheckpointError, OSError) as error:
            json.dump({"kind": type(error).__name__, "error": str(error)}, ready)
            return 1
        json.dump({"pid": os.getpid()}, ready)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    log.info("keeping run %s on host %s for %s", config.run, config.host, config.store_url)
    is_flushed = server.serve()
    with suppress(FileNotFoundError):
        config.socket_path.unlink()
    log.info("ended, %s", "everything durable" if is_flushed else "NOT everything durable")
    return 0 if is_flushed else 1


def _start(config: KeeperConfig) -> Server:
    _hold_life_lock(config)
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


def _hold_life_lock(config: KeeperConfig) -> None:
    """Make sure, for as long as this process lives, that it is the only keeper here."""
    fd = os.open(config.life_lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise KeeperLost(f"another keeper still lives in {config.home}") from error
    os.ftruncate(fd, 0)
    os.write(fd, str(os.getpid()).encode())


def _parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="python -m checkpoint.keeper", description=__doc__)
    parser.add_argument("--config", required=True, help="KeeperConfig as JSON")
    parser.add_argument("--directory", required=True, help="private directory for socket, locks and log")
    parser.add_argument("--ready-fd", required=True, type=int, help="file descriptor to report on when up")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
