"""Retention: lets checkpoints expire that no policy keeps, and sweeps what is left of them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from checkpoint.engine.bounds import check_kind, check_seconds, check_several, check_store
from checkpoint.engine.receipt import RECEIPT_SEQ
from checkpoint.errors import AlreadyExists, NotFound
from checkpoint.format.json_fields import dump_json
from checkpoint.format.keys import INDEX, PACKS, expired_key, manifest_key, pages_prefix, parse_page_key
from checkpoint.lifecycle.claims import Patience
from checkpoint.lifecycle.marks import scores, tags, verified
from checkpoint.lifecycle.policies import BestByMetric, Candidate, Policy, Verdict, judge
from checkpoint.lifecycle.survey import Standing, digest_of, objects_of, survey
from checkpoint.lifecycle.sweep import Removed, Swept, sweep
from checkpoint.store.contract import Store

LINGER_S = 60.0


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune decided of each checkpoint and why, what it deleted, and what it could not judge.

    `num_waiting_bytes` belong to checkpoints that expired, and are freed by a prune after the linger. `runs`
    says whose each of them is or was, by step.
    """

    verdicts: tuple[Verdict, ...]
    removed: tuple[Removed, ...]
    problems: tuple[str, ...]
    num_waiting_bytes: int
    runs: Mapping[int, str] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[int, ...]:
        """The steps that stay."""
        return tuple(one.step for one in self.verdicts if one.is_kept)

    @property
    def expired(self) -> tuple[int, ...]:
        """The steps that exist no more."""
        return tuple(one.step for one in self.verdicts if not one.is_kept)

    @property
    def num_bytes(self) -> int:
        """Bytes that were freed."""
        return sum(one.num_bytes for one in self.removed)


def prune(
    store: Store,
    policies: Sequence[Policy],
    *,
    now_s: float,
    grace_s: float,
    linger_s: float = LINGER_S,
    run: str | None = None,
) -> PruneReport:
    """Let the checkpoints expire that no policy keeps, and delete what nothing has needed for a while.

    First a manifest moves to `control/expired/`: then the checkpoint is no more. Its packs and pages stay for
    `linger_s` (not longer than `grace_s`), so that who reads it or just commits it comes to an end; then
    those go that nothing else needs. What never belonged to a checkpoint goes after `grace_s`, which has to
    be longer than any save takes. Saves that build on what expires, promotions and other prunes may go on
    meanwhile; with a grace of 0 they may not. A prune may break off anywhere: the next one goes on.

    With a `run` only its checkpoints are judged: another's stay, and no policy counts them.

    Never expire: the newest checkpoint, the newest that has all of its objects, the newest that was verified,
    and whatever is tagged. A manifest that cannot be read is left alone; while there is one, no pack or page
    is deleted, for it may need them; nor any orphan within `grace_s` of a checkpoint being set aside.
    """
    check_store("store", store)
    check_several("policies", policies, Policy)
    for name, seconds in (("now_s", now_s), ("grace_s", grace_s), ("linger_s", linger_s)):
        check_seconds(name, seconds)
    check_kind("run", run, str | None)
    found = survey(store)
    judged = {step: one for step, one in found.standing.items() if run in (None, one.manifest.run)}
    held = _protected(store, judged)
    verdicts = judge(_candidates(store, judged, policies), policies, protected=held)
    verdicts += _left_alone(found.standing, judged)
    removed: list[Removed] = []
    gone = {one.step for one in verdicts if not one.is_kept}
    for verdict in verdicts:
        if verdict.step in gone:
            removed += _expire(store, found.standing[verdict.step], verdict.why)
    revived = _revive(store, {step: found.standing[step] for step in gone})
    verdicts = [
        Verdict(one.step, is_kept=True, why=revived[one.step]) if one.step in revived else one
        for one in verdicts
    ]
    standing = {step: one for step, one in found.standing.items() if step not in gone or step in revived}
    patience = Patience(now_s, grace_s, min(linger_s, grace_s))
    swept = Swept() if found.problems else sweep(store, standing, patience)
    problems = [f"{one}; no pack or page was deleted" for one in found.problems]
    return PruneReport(
        tuple(sorted(verdicts, key=lambda one: one.step)),
        (*removed, *swept.removed),
        (*problems, *swept.problems),
        swept.num_waiting_bytes,
        {step: one.manifest.run for step, one in found.standing.items()},
    )


def metric_names(store: Store) -> set[str]:
    """Return the metrics that any checkpoint was saved with, or scored by later."""
    check_store("store", store)
    standing = survey(store).standing.items()
    saved = [one.manifest.metrics for _, one in standing]
    return set().union(*saved, *(scores(store, step, one.digest) for step, one in standing))


def _left_alone(standing: Mapping[int, Standing], judged: Mapping[int, Standing]) -> list[Verdict]:
    """Say of the checkpoints that were not judged that they stay."""
    return [
        Verdict(step, is_kept=True, why=f"of another run, {one.manifest.run!r}")
        for step, one in standing.items()
        if step not in judged
    ]


def _candidates(
    store: Store, standing: Mapping[int, Standing], policies: Sequence[Policy]
) -> list[Candidate]:
    """Gather what policies judge by; scores are read only if one asks for a metric."""
    are_scored = any(isinstance(policy, BestByMetric) for policy in policies)
    return [
        Candidate(
            step,
            one.manifest.created_utc,
            {**one.manifest.metrics, **(scores(store, step, one.digest) if are_scored else {})},
            {ref.key: ref.num_bytes for ref in objects_of(one.manifest)},
        )
        for step, one in standing.items()
    ]


def _protected(store: Store, standing: Mapping[int, Standing]) -> dict[int, str]:
    """Map the steps that no policy may touch to why."""
    held: dict[int, str] = {}
    sizes = {entry.key: entry.num_bytes for prefix in (PACKS, INDEX) for entry in store.list(prefix)}
    whole = [
        step
        for step, one in standing.items()
        if all(sizes.get(ref.key) == ref.num_bytes for ref in objects_of(one.manifest))
    ]
    proved = verified(store)
    sound = [step for step, one in standing.items() if (step, one.digest) in proved]
    held |= dict.fromkeys(whole[-1:], "the newest that has all of its objects")
    held |= dict.fromkeys(sound[-1:], "the newest that was verified")
    return held | {step: f"tagged {name}" for name, step in tags(store).items()}


def _expire(store: Store, one: Standing, why: str) -> list[Removed]:
    """Move a manifest to where the sweep finds it, unless it is another one by now.

    Its receipts go before it does: with them, a slow host would commit the step once more.
    """
    manifest = one.manifest
    key = manifest_key(manifest.step)
    try:
        data = store.read(key)[0]
    except NotFound:
        return []
    if digest_of(data) != one.digest:
        return []
    grave = expired_key(manifest.step, one.digest)
    store.put(f"{grave}.json", dump_json({"policy": why, "step": manifest.step}, "the reason"))
    store.put(grave, data)
    removed = []
    for entry in store.list(pages_prefix(manifest.generation, manifest.step)):
        page = parse_page_key(entry.key)
        if page is not None and page.seq == RECEIPT_SEQ:
            store.delete(entry.key)
            removed.append(
                Removed(entry.key, entry.num_bytes, f"the receipt of step {manifest.step}, which {why}")
            )
    store.delete(key)
    return [*removed, Removed(key, 0, f"step {manifest.step} {why}")]


def _revive(store: Store, gone: Mapping[int, Standing]) -> dict[int, str]:
    """Bring back what was tagged while it expired; return why it stays."""
    if not gone:
        return {}
    revived = {}
    for name, step in tags(store).items():
        if step in gone:
            grave = expired_key(step, gone[step].digest)
            with suppress(AlreadyExists, NotFound):
                store.put_new(manifest_key(step), store.read(grave)[0])
            store.delete(f"{grave}.json")
            store.delete(grave)
            revived[step] = f"tagged {name} meanwhile"
    return revived
