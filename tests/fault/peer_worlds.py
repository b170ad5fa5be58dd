"""Keeper processes that stand for the hosts of a world: started, given snapshots, and killed by tests."""

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from checkpoint import (
    Durable,
    Failed,
    KeeperConfig,
    KeeperHost,
    Manifest,
    Outcome,
    Restored,
    Wanted,
    connect,
    restore_into,
)
from checkpoint.engine.contract import Handling
from checkpoint.engine.source import Source
from checkpoint.format.layout import Box
from checkpoint.keeper.peering.policy import Address, Parity, PeerPolicy
from checkpoint.keeper.peering.source import PeerSource
from tests.fault.checkpoint_shares import Rows, begin, handling, plan_of
from tests.fault.checkpoint_worlds import MIB

MEMORY = handling("memory")
PATIENCE_S = 30.0


@dataclass(eq=False, slots=True)
class Hosts:
    """Keepers of hosts h0, h1, ..., each with a rank or two of one world, and what each has told."""

    root: Path
    num_hosts: int
    parity: Parity | None
    arena_bytes: int = 4 * MIB
    ranks_each: int = 1
    handles: dict[str, KeeperHost] = field(default_factory=dict)
    told: dict[str, list[Outcome]] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts of the ranks, by rank."""
        return tuple(f"h{number}" for number in range(self.num_hosts) for _ in range(self.ranks_each))

    def config(self, name: str) -> KeeperConfig:
        """What the keeper of a host is told."""
        return KeeperConfig(
            "run", name, str(self.root / "store"), self.arena_bytes, lease_s=30, hold=1,
            directory=self.root / name,
        )  # fmt: skip

    def start(self, names: Collection[str]) -> None:
        """Start keepers, and have them listen."""
        for name in dict.fromkeys(names):
            self.handles[name] = connect(self.config(name))
            self.told[name] = []
            known = self.handles[name].listen(PeerPolicy("127.0.0.1", parity=self.parity))
            self.addresses[name] = known[name]

    def meet(self, generation: int = 1, names: Sequence[str] = ()) -> None:
        """Introduce the keepers to each other, as the world of a generation."""
        world = dict.fromkeys(names or self.names)
        for name in world:
            self.handles[name].meet(generation, {one: self.addresses[one] for one in world})

    def give(
        self,
        step: int,
        rows: Rows,
        *,
        generation: int = 1,
        to: Collection[str] = (),
        treated: Handling = MEMORY,
    ) -> None:
        """Give each host its ranks' shares of a snapshot."""
        for rank, name in enumerate(self.names):
            if not to or name in to:
                plan = plan_of(rows, treated, rank=rank, hosts=self.names)
                host = self.handles[name]
                ticket = begin(host, step, rows, plan, rank=rank, generation=generation)
                assert ticket is not None
                host.seal(ticket)

    def news(self, name: str, tier: str) -> list[tuple[str, int]]:
        """List what a host has told of a tier: the kind, and the step."""
        self.told[name] += self.handles[name].outcomes()
        about = [one for one in self.told[name] if isinstance(one, Durable | Failed) and one.tier == tier]
        return [(type(one).__name__, one.step) for one in about]

    def await_told(self, tier: str, step: int, kind: str = "Durable", names: Collection[str] = ()) -> None:
        """Wait until hosts have told something of a step on a tier."""
        for name in dict.fromkeys(names or self.names):
            wanted = (kind, step)
            eventually(partial(self._has_told, name, tier, wanted), (name, self.told[name]))

    def _has_told(self, name: str, tier: str, wanted: tuple[str, int]) -> bool:
        return wanted in self.news(name, tier)

    def pid(self, name: str) -> int:
        """The process id of a host's keeper."""
        return int(self.config(name).life_lock_path.read_text())

    def kill(self, name: str) -> None:
        """SIGKILL a host's keeper, and with it all that it held."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), name)

    @contextmanager
    def source(self, own: str = "h0") -> Iterator[PeerSource]:
        """What a restore reads from."""
        with closing(PeerSource(self.addresses, own)) as source:
            yield source


@contextmanager
def hosts_of(
    root: Path, num_hosts: int, parity: Parity | None, *, arena_bytes: int = 4 * MIB, ranks_each: int = 1
) -> Iterator[Hosts]:
    """Start the hosts of a world; end them afterwards."""
    root.chmod(0o700)
    hosts = Hosts(root, num_hosts, parity, arena_bytes, ranks_each)
    try:
        hosts.start(hosts.names)
        hosts.meet()
        yield hosts
    finally:
        for name, handle in hosts.handles.items():
            handle.close()
            with suppress(OSError, ValueError):
                os.kill(hosts.pid(name), signal.SIGCONT)
                os.kill(hosts.pid(name), signal.SIGKILL)


def rows_at(step: int, num_floats: int = 12 << 12) -> dict[str, np.ndarray]:
    """Return a state that is different at every step, and that 1, 2, 3, 4 or 6 ranks can share evenly."""
    generator = np.random.default_rng(step)
    return {"w": generator.standard_normal(num_floats, np.float32), "steps": np.full(12, step, np.int64)}


def restored(source: Source | Sequence[Source], step: int | None = None) -> tuple[Restored, Rows]:
    """Restore a snapshot through the engine, which proves it."""
    found: dict[str, np.ndarray] = {}

    def wanted(manifest: Manifest) -> list[Wanted]:
        found.update({one.name: np.zeros(one.shape, one.dtype) for one in manifest.tensors})
        return [
            Wanted(one.name, one.dtype, one.shape, Box.whole(one.shape), torch.from_numpy(found[one.name]))
            for one in manifest.tensors
        ]

    return restore_into(source, wanted, step=step), found


def eventually(is_so: Callable[[], bool], what: object = "") -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
