"""Tiers: places for checkpoints, each with its cadence, its retention and its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from checkpoint.engine.bounds import check_kind, check_several, check_whole
from checkpoint.format.tree import Json
from checkpoint.lifecycle.policies import LatestN, Policy, WithinBytes, parse_policies, policy_to_text
from checkpoint.store.places import check_apart

_FIELDS = {"url", "every", "keep", "name", "budget_bytes"}


@dataclass(frozen=True, slots=True)
class Tier:
    """A store that holds the checkpoints of every `every`-th step as long as a policy of `keep` does.

    `name` is what reports and outcomes call it; by default its URL. With a `budget_bytes` the oldest expire
    until the rest fits.
    """

    url: str
    every: int = 1
    keep: tuple[Policy, ...] = (LatestN(3),)
    name: str = ""
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", parse_policies(self.keep))
        check_kind("url", self.url, str)
        check_kind("every", self.every, int)
        if self.budget_bytes is not None:
            check_whole("budget_bytes", self.budget_bytes, 1)
        if not self.url or self.every < 1:
            raise ValueError(
                f"a tier needs a URL, and a cadence of 1 step or more: not {self.url!r}, every {self.every}"
            )
        if not self.policies:
            raise ValueError(f"tier {self.label} keeps nothing: name at least one retention policy")

    @property
    def label(self) -> str:
        """What the tier is called."""
        return self.name or self.url

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All that `prune` is to go by here, the budget among them."""
        return self.keep if self.budget_bytes is None else (*self.keep, WithinBytes(self.budget_bytes))


def is_due(tier: Tier, step: int) -> bool:
    """Whether the checkpoint of a step belongs on the tier."""
    return step % tier.every == 0


def check_tiers(tiers: Sequence[Tier]) -> None:
    """Hold tiers, the nearest first, against each other. Raises ValueError that names what does not fit."""
    check_several("tiers", tiers, Tier)
    names = [tier.label for tier in tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tiers are called {twice[0]!r}: give each its own name and URL")
    check_apart([(f"tier {tier.label!r}", tier.url) for tier in tiers])
    for near, far in pairwise(tiers):
        if far.every % near.every:
            raise ValueError(
                f"tier {far.label} is to hold every {far.every} steps, but the nearer {near.label} has only "
                f"every {near.every}: make the one a multiple of the other"
            )


def tier_to_json(tier: Tier) -> dict[str, Json]:
    """Return a tier as plain data, for a message or a file."""
    return {
        "url": tier.url,
        "every": tier.every,
        "keep": [policy_to_text(policy) for policy in tier.keep],
        "name": tier.name,
        "budget_bytes": tier.budget_bytes,
    }


def parse_tier(data: Mapping[str, Json]) -> Tier:
    """Read a tier from plain data; what is left out has its default. Raises ValueError."""
    if unknown := sorted(data.keys() - _FIELDS):
        raise ValueError(f"a tier has no {unknown[0]!r}: it has {', '.join(sorted(_FIELDS))}")
    url, every, name = data.get("url"), data.get("every", 1), data.get("name", "")
    keep, budget_bytes = data.get("keep"), data.get("budget_bytes")
    if (
        not isinstance(url, str)
        or type(every) is not int
        or not isinstance(name, str)
        or not (budget_bytes is None or type(budget_bytes) is int)
        or not (keep is None or isinstance(keep, list))
    ):
        raise ValueError(f"a tier is a url, every, keep, name and budget_bytes, not {str(dict(data))[:160]}")
    policies = (LatestN(3),) if keep is None else parse_policies(map(str, keep))
    return Tier(url, every, policies, name, budget_bytes)
