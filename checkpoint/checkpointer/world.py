"""Which rank this process is, on which host, in which generation: agreed once, before anything is saved."""

import logging
import re
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import xxhash

from checkpoint.checkpointer.talking import gathered, told_by_first
from checkpoint.engine.generations import claim_generation, newest_generation
from checkpoint.engine.save import Share
from checkpoint.errors import CheckpointError
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.checkpoint")

_MAX_HOST = 32
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Said = TypeVar("Said")


@dataclass(frozen=True, slots=True)
class World:
    """This process among the ranks of `torch.distributed`, or alone.

    Only construction and restore speak to the other ranks, through the default process group; saving never.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    generation: int

    @property
    def share(self) -> Share:
        """The rank's place, as a saver takes it."""
        return Share(self.generation, self.rank, self.size, self.hosts)

    @property
    def host(self) -> str:
        """The host that this rank lives on."""
        return self.hosts[self.rank]

    def tell(self, say: Callable[[], Said]) -> Said:
        """Return on every rank what rank 0 says; raise on every rank if it cannot say it."""
        return _from_first(self.rank, self.size, say)

    def agreed(self, say: Callable[[], Said]) -> list[Said]:
        """Return what every rank says, by rank; raise on every rank if one cannot say it."""
        said: Said | None = None
        failure, why = None, ""
        try:
            said = say()
        except Exception as error:  # noqa: BLE001 -- the others wait for a word; raised below
            failure, why = error, _told(error)
        told = self.everybody((said, why))
        if failure is not None:
            raise failure
        for rank, (_, reason) in enumerate(told):
            if reason:
                raise CheckpointError(f"rank {rank} failed: {reason}")
        return [cast(Said, one) for one, _ in told]

    def everybody(self, said: Said) -> list[Said]:
        """Return what every rank says, by rank."""
        return _gathered(self.size, said)


def join_world(store: Store, *, apart: str = "", host: str = "") -> World:
    """Find out the ranks and their hosts, and claim the next generation: rank 0 does, for all.

    This rank's host goes by its machine's name, or is called `host`. With `apart` every rank is a host of its
    own: its snapshots are kept within its process.
    """
    is_world = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if is_world else (0, 1)
    if not is_world and dist.is_available() and dist.is_torchelastic_launched():
        log.warning("this process saves alone: call init_process_group before making a Checkpointer")
    machines = _gathered(size, (host, host) if host else _machine())
    hosts = _host_names(machines)
    if apart and size > 1:
        hosts = tuple(f"{host[: _MAX_HOST - 8]}{apart}{number}" for number, host in enumerate(hosts))
    generation = _from_first(rank, size, lambda: _claim(store))
    return World(rank, size, hosts, generation)


def _claim(store: Store) -> int:
    token = uuid.uuid4().hex
    generation = newest_generation(store) + 1
    while not claim_generation(store, generation, token):
        generation += 1
    return generation


def _machine() -> tuple[str, str]:
    """Return the machine's name, and what tells it from another of that name."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return socket.gethostname(), boot


def _host_names(machines: list[tuple[str, str]]) -> tuple[str, ...]:
    """Name the hosts as keys can: short, lower case, letters and digits; one name for one machine."""
    names: dict[tuple[str, str], str] = {}
    for machine in machines:
        plain = re.sub(r"[^a-z0-9]", "", machine[0].lower())
        twins = {other for other in machines if re.sub(r"[^a-z0-9]", "", other[0].lower()) == plain}
        if not plain or len(plain) > _MAX_HOST or len(twins) > 1:
            digest = xxhash.xxh3_64_hexdigest("\0".join(machine if len(twins) > 1 else machine[:1]).encode())
            plain = plain[: _MAX_HOST - len(digest)] + digest
        names[machine] = plain
    return tuple(names[machine] for machine in machines)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _gathered(size: int, said: Said) -> list[Said]:
    if size == 1:
        return [said]
    return gathered(said)


def _from_first(rank: int, size: int, say: Callable[[], Said]) -> Said:
    if size == 1:
        return say()
    told: list[Any] = [None, ""]
    failure: Exception | None = None
    if rank == 0:
        try:
            told[0] = say()
        except Exception as error:  # noqa: BLE001 -- the others wait for a word; raised below
            failure, told[1] = error, _told(error)
    told = told_by_first(told)
    if failure is not None:
        raise failure
    if told[1]:
        raise CheckpointError(f"rank 0 failed: {told[1]}")
    first: Said = told[0]
    return first
