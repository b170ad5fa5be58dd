"""Who keeps this process's snapshots: the keeper of its host, or, for a store within this process, itself."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoint.checkpointer.branches import named
from checkpoint.checkpointer.world import World
from checkpoint.engine.arena import Sizing
from checkpoint.engine.held import Held
from checkpoint.engine.host import LocalHost
from checkpoint.engine.leaves import describe, take_apart
from checkpoint.engine.source import Source
from checkpoint.engine.structure import host_bytes
from checkpoint.errors import CheckpointError
from checkpoint.keeper import KeeperConfig, KeeperHost, connect
from checkpoint.keeper.home import is_free
from checkpoint.lifecycle.policies import Policy
from checkpoint.lifecycle.tiers import Tier
from checkpoint.store.contract import Store

log = logging.getLogger("holdfast.checkpoint")

MIB = 1 << 20
_SILENT_S = 2.0  # a restore that has to wait longer for what is under way says so
_SLACK_BYTES = 1 * MIB
_SPARE = 3.0  # a state before the optimizer's first step may grow to three times as much

AnyHost = LocalHost | KeeperHost
Kept = Literal["by a keeper", "in this process"]


@dataclass(frozen=True, slots=True)
class HostPolicy:
    """Who keeps snapshots, where, how many; `arena_mib` None asks for room for two, and those it holds."""

    url: str
    run: str
    keep: tuple[Policy, ...]
    tiers: tuple[Tier, ...]
    hold: int
    arena_mib: int | None
    kept: Kept
    directory: Path | None
    lease_s: float
    flush_s: float
    num_guarded: int = 0  # snapshots that parity keeps besides

    def config(self, host: str, arena_bytes: int) -> KeeperConfig:
        """Return what the keeper of a host is told."""
        return KeeperConfig(
            run=self.run,
            host=host,
            store_url=self.url,
            arena_bytes=arena_bytes,
            lease_s=self.lease_s,
            flush_s=self.flush_s,
            hold=self.hold,
            keep=self.keep,
            far=self.tiers,
            directory=self.directory,
            sizing=self.sizing,
        )

    @property
    def sizing(self) -> Sizing:
        """Whether the arena may grow with the state: unless somebody said how large it is to be."""
        return Sizing("as needed" if self.arena_mib is None else "fixed", "`Options(arena_mib=)`")


def open_host(policy: HostPolicy, store: Store, world: World, tree: Any) -> AnyHost:
    """Join the keeper of this host or start one, with room for a state like `tree`."""
    arena_bytes = arena_for(policy, world, tree)
    if policy.kept == "in this process":
        return LocalHost(store, world.host, arena_bytes=arena_bytes, hold=policy.hold, sizing=policy.sizing)
    return connect(policy.config(world.host, arena_bytes))


def find_host(policy: HostPolicy, world: World) -> KeeperHost | None:
    """Join the keeper of this host if one lives: it may hold what its last trainer captured.

    Its arena is made to measure when the first state is saved.
    """
    if not has_keeper(policy, world):
        return None
    return connect(policy.config(world.host, (policy.arena_mib or 1) * MIB))


def arena_for(policy: HostPolicy, world: World, tree: Any) -> int:
    """Return how large an arena is to be: as was said, else two snapshots of this host and those held."""
    if policy.arena_mib is not None:
        return policy.arena_mib * MIB
    taken = take_apart(tree)
    leaves = [
        describe(name, leaf, world.rank, world.size)
        for name, leaf in zip(taken.names, taken.leaves, strict=True)
    ]
    one = host_bytes(leaves, world.hosts, world.host)
    spare = _SPARE if _is_young(tree) else 1.0
    return int(one * (2 + policy.hold + policy.num_guarded) * spare) + _SLACK_BYTES


@contextmanager
def held_by(host: AnyHost | None) -> Iterator[Sequence[Held]]:
    """Pin what a host holds in memory, if anything."""
    if host is None:
        yield ()
        return
    with host.held() as held:
        yield () if held is None else (held,)


def has_keeper(policy: HostPolicy, world: World) -> bool:
    """Whether a keeper of this host lives: a predecessor's, which may still write what that captured."""
    config = policy.config(world.host, MIB)
    return policy.kept == "by a keeper" and config.life_lock_path.exists() and not is_free(config)


def settle(
    host: AnyHost | None, above: int, world: World, *, timeout_s: float, patience_s: float
) -> tuple[int, ...]:
    """Wait, on every rank, until what the hosts have captured above a step is durable; return what is not.

    A step that a predecessor captured would otherwise come up under this process's feet: it would be restored
    from an older one, and find the step taken when it saves it anew. A store that takes nothing for
    `patience_s` is not waited for any longer. A host that did its part waits for the others', and tells by
    nothing that they live: so it waits once more if another came to an end after it.
    """
    deadline_s = time.monotonic() + timeout_s
    left = world.everybody(_settled(host, above, timeout_s, patience_s))
    if any(one != left[0] for one in left):
        rest_s = max(deadline_s - time.monotonic(), 0.0)
        left = world.everybody(_settled(host, above, rest_s, patience_s))
    return tuple(sorted({step for one in left for step in one}))


def _settled(host: AnyHost | None, above: int, timeout_s: float, patience_s: float) -> tuple[int, ...]:
    first_s = min(timeout_s, _SILENT_S)
    left = () if host is None else host.settle(above, first_s, patience_s=patience_s)
    if host is not None and left and timeout_s > first_s:
        log.warning("%s still being written: waiting for %.0f s at most", named(left), timeout_s)
        left = host.settle(above, timeout_s - first_s, patience_s=patience_s)
    return left


def settled_before(sources: Sequence[Source], step: int | None) -> int:
    """Return above which step a restore has to wait for what is under way: a source has it, or it is older.

    Newer ones than a `step` that is asked for are waited for as well: they may be in its way.
    """
    found = {-1}
    for source in sources:
        with suppress(CheckpointError):  # who cannot tell is found out when it is read
            found.update(source.steps())
    if step is None:
        return max(found)
    return step if step in found else step - 1


def _is_young(tree: Any) -> bool:
    """Whether a state has an optimizer's that has not made a step."""
    if not isinstance(tree, dict):
        return False
    is_blank = "param_groups" in tree and not tree.get("state")
    return is_blank or any(_is_young(item) for item in tree.values())
