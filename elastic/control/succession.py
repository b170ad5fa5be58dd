"""Who may be in the next world, whether there is a reason for one, and whom none needs any more. Pure."""

from collections.abc import Collection
from dataclasses import replace

from elastic.control.membership import Membership
from elastic.control.policy import Decision, Waiting, WorldPolicy, choose_world

Candidates = tuple[tuple[str, ...], Collection[str], WorldPolicy]


def find_candidates(members: Membership, policy: WorldPolicy, most_ranks: int) -> Candidates:
    """Return who stays, who may join them, and the policy that says how many.

    If all who hold the state are leaving, one of them hands it over, if a newcomer fits beside it. Until a
    world has settled, all of an earlier driver's members are in it, or as many as can be: those first who say
    that they hold the newest state. Where all are leaving, or have saved and left, whoever comes goes on as
    survivors do.
    """
    if members.is_deserted or members.is_safe:
        return tuple(members.outside), (), policy
    if found := members.found:
        others = [one for one in (*members.staying, *members.outside) if one not in found]
        at_least_found = min(max(policy.workers, len(found)), most_ranks)
        return found, others, replace(policy, workers=at_least_found)
    if members.has_heir:
        return members.staying, members.outside, policy
    heirs = tuple(one for one in members.heirs if one not in members.leaving) or members.heirs[:1]
    others = [one for one in (*members.staying, *members.outside) if one not in heirs]
    if heirs[0] not in members.leaving:
        return heirs, others, policy
    if most_ranks == 1:
        return (), others, policy
    return heirs, others, replace(policy, workers=min(max(2, policy.workers), most_ranks))


def is_left_to_store(members: Membership, policy: WorldPolicy, most_ranks: int) -> bool:
    """Whether what the members hold goes on through the store only: all of them are leaving, or all who hold
    it are, and no newcomer fits beside one of them, or too few are there.
    """
    if members.is_deserted or members.has_heir:
        return members.is_deserted
    num_others = len(members.outside) + len(members.staying)
    return most_ranks == 1 or 1 + num_others < policy.min_workers


def decide(
    members: Membership, policy: WorldPolicy, most_ranks: int, copies: int, waiting: Waiting
) -> Decision:
    """Choose the next world. If members that are there are not in it, so many that all `copies` of a shard of
    the state may be missing with them, a world comes before it in which they give it to those who stay.
    """
    decision = choose_world(*find_candidates(members, policy, most_ranks), waiting)
    if not (copies and decision.members):
        return decision
    chosen = frozenset(decision.members)
    short = [one for one in members.spreads if len(one - chosen) >= min(copies, len(one))]
    givers = tuple(one for one in members.hosts if one not in chosen and any(one in each for each in short))
    staying = tuple(one for one in decision.members if any(one in each for each in members.spreads))
    newcomers = tuple(one for one in decision.members if one not in staying)
    newcomers = newcomers[: max(0, most_ranks - len(staying) - len(givers))]
    if givers and newcomers and members.leaving.keys() >= set(staying):  # one of them need not hold it all
        staying, givers = newcomers, staying + givers
    givers = givers[: max(0, most_ranks - len(staying))]
    if not (givers and staying):
        return decision
    why = f"{', '.join(givers)} give what they hold to those who stay"
    return replace(decision, members=staying + givers, leaving=givers, reason=why)


def has_reason(members: Membership, policy: WorldPolicy) -> bool:
    """Whether the world that trains should become another one at its next step boundary."""
    num_staying = len(members.staying)
    if not num_staying:  # whoever there is gets the state while it can be had
        return bool(members.outside)
    if num_staying < len(members.world):
        return num_staying + len(members.outside) >= policy.min_workers
    return num_staying > policy.workers or (num_staying < policy.workers and bool(members.outside))


def find_unneeded(members: Membership, policy: WorldPolicy) -> dict[str, str]:
    """Name whom no world needs, and why: who is leaving, who holds an old state, who is one too many.

    Who holds the newest state is needed until another world has it, though that went on without them; who
    leaves is not any more once it is safe: its replacement may need the very place that it has.
    """
    done = dict.fromkeys(members.left_behind, "the world went on without it")
    done |= {one: why for one, why in members.leaving.items() if not members.is_ranked(one)}
    needed = members.needed
    done = {one: why for one, why in done.items() if one not in needed}
    num_lasting = members.num_lasting - len(done.keys() - members.leaving.keys())
    num_surplus = num_lasting - max(policy.workers, len(members.staying)) - policy.standbys
    idle = (
        [one for one in (*members.starting, *members.outside) if one not in done] if num_surplus > 0 else []
    )
    return done | dict.fromkeys(idle[:num_surplus], f"{policy.workers} workers are wanted")
