"""What a keeper makes of a client's settings that are not its own. Pure."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint.keeper.settings import KeeperConfig
from checkpoint.lifecycle.policies import policy_to_text
from checkpoint.lifecycle.tiers import tier_to_json

_IDENTITY = ("run", "host", "store_url")


@dataclass(frozen=True, slots=True)
class Adopt:
    """The client's settings hold from now on."""


@dataclass(frozen=True, slots=True)
class MakeWay:
    """This keeper has nothing in hand, and ends for the one that the client wants."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The client cannot be served as long as others are, or as what they saved is not durable."""

    why: str


@dataclass(frozen=True, slots=True)
class Guest:
    """A client that is here already: its process, and what it asked for."""

    pid: int
    config: KeeperConfig


Reception = Adopt | MakeWay | Refuse


def receive_client(
    mine: KeeperConfig, theirs: KeeperConfig, others: Iterable[Guest], num_undone: int
) -> Reception:
    """Decide whether a client's settings replace a keeper's own.

    The newest ones count, unless another living process asked for others: neither would get what it was
    promised. `num_undone` tells how much is still to be written.
    """
    guests = list(others)
    if foreign := _differences(mine, theirs, _IDENTITY):
        if not guests and not num_undone:
            return MakeWay()
        busy = f"processes {_pids(guests)} use it" if guests else "what that saved is not durable yet"
        return Refuse(
            f"the keeper in {theirs.home} is another run's ({'; '.join(foreign)}), and {busy}: "
            "give each run a directory of its own"
        )
    for guest in guests:
        if differing := _differences(guest.config, theirs, ("keep", "far", "hold")):
            return Refuse(
                f"process {guest.pid} saves to {theirs.store_url} with other settings "
                f"({'; '.join(differing)}): end it, or give both the same"
            )
    return Adopt()


def _differences(there: KeeperConfig, here: KeeperConfig, names: Iterable[str]) -> list[str]:
    return [
        f"{name} is {_shown(there, name)} there and {_shown(here, name)} here"
        for name in names
        if getattr(there, name) != getattr(here, name)
    ]


def _shown(config: KeeperConfig, name: str) -> str:
    match name:
        case "keep":
            return ", ".join(map(policy_to_text, config.keep)) or "everything"
        case "far":
            return ", ".join(json.dumps(tier_to_json(tier)) for tier in config.far) or "no far tier"
        case _:
            return str(getattr(config, name))


def _pids(guests: Iterable[Guest]) -> str:
    return ", ".join(str(pid) for pid in sorted({guest.pid for guest in guests}))
