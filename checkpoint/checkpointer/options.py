"""What a Checkpointer is made of: what seldom needs to be said of it, and what it cannot be made of."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.checkpointer.hosting import HostPolicy, Kept
from checkpoint.engine.bounds import check_kind, check_one_of, check_seconds, check_whole
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.save import SavePolicy
from checkpoint.format.texts import check_text
from checkpoint.keeper.peering.policy import Parity
from checkpoint.lifecycle.policies import parse_policies
from checkpoint.lifecycle.tiers import Tier, check_tiers

NEAREST = "store"
_LEASE_S, _SHORT_LEASE_S = 60.0, 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """What seldom needs to be said of a Checkpointer.

    `tiers` are the stores beyond the nearest, each with its cadence and retention. The arena, shared memory
    that holds snapshots until they are written, is `arena_mib` large; by default it has room for two, and
    those held, and grows with the state. Snapshots are kept by a keeper, a process of its own, unless the
    store lives in this one. It outlives this one until they are written, and for `lease_s`, by default a
    minute if it holds any in memory. Leaving waits for `flush_s` at most until everything is durable.

    With `parity` the hosts of a world protect what they hold in memory for the loss of some of them; the
    arena has room for two snapshots more then. Their keepers reach each other at `address`, by default that
    from which this machine reaches the first rank. A host is called as its machine, or `host` (where several
    hosts have one name), and breaks together with those of its failure `domain`, by default alone.
    """

    tiers: tuple[Tier, ...] = ()
    arena_mib: int | None = None
    saving: SavePolicy = field(default_factory=SavePolicy)
    reading: ReadPolicy = field(default_factory=ReadPolicy)
    kept: Kept | None = None
    directory: Path | None = None
    lease_s: float | None = None
    flush_s: float = 600.0
    parity: Parity | None = None
    address: str = ""
    host: str = ""
    domain: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", _tiers(self.tiers))
        check_kind("saving", self.saving, SavePolicy)
        check_kind("reading", self.reading, ReadPolicy)
        if self.arena_mib is not None:
            check_whole("arena_mib", self.arena_mib, 1)
        if self.kept is not None:
            check_one_of("kept", self.kept, ("by a keeper", "in this process"))
        if self.directory is not None:
            object.__setattr__(self, "directory", Path(self.directory))
        if self.lease_s is not None:
            check_seconds("lease_s", self.lease_s)
        check_seconds("flush_s", self.flush_s)
        if self.parity is not None:
            check_kind("parity", self.parity, Parity)
        for name in ("address", "host", "domain"):
            check_kind(name, getattr(self, name), str)


def place_of(url: Any) -> str:
    """Return a URL or a path as text. Raises TypeError."""
    if not isinstance(url, (str, os.PathLike)):
        raise TypeError(f"a store's place is a URL or a path, not {url!r}")
    return os.fspath(url)


def host_policy_of(
    place: str, run: str, keep: Any, every: int, *, memory: int, options: Options
) -> HostPolicy:
    """Return where snapshots are kept. Raises TypeError, ValueError, FormatError for what makes no sense."""
    if not run:
        raise ValueError("a run has a name: leave it out, or give one that tells it from others")
    check_text(run, "a run's name")
    if any(type(number) is not int for number in (every, memory)) or every < 1 or memory < 0:
        raise ValueError(
            f"every {every} steps, {memory} held in memory: whole numbers, not less than 1 and 0"
        )
    policies = parse_policies(keep)
    check_tiers((Tier(place, every, name=NEAREST), *options.tiers))
    kept = options.kept or ("in this process" if place.startswith("memory:") else "by a keeper")
    if kept == "in this process" and (keep or options.tiers):
        raise ValueError("retention and further tiers are a keeper's work: use a store that one can reach")
    return HostPolicy(
        place, run, policies, options.tiers, memory, options.arena_mib, kept,
        options.directory, _lease_s(options.lease_s, memory), options.flush_s,
        2 if options.parity is not None else 0,
    )  # fmt: skip


def _tiers(given: Any) -> tuple[Tier, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, Tier) for one in given):
        raise TypeError(f"`tiers` are several Tier(url), as a tuple, not {given!r}")
    return tuple(given)


def _lease_s(wanted_s: float | None, num_held: int) -> float:
    if wanted_s is not None:
        return wanted_s
    return _LEASE_S if num_held else _SHORT_LEASE_S
