"""What is said of checkpoints after they were made: tags, scores, and that they were read back and proved."""

import json
from collections.abc import Mapping
from numbers import Real

from checkpoint.engine.bounds import check_kind, check_step, check_store
from checkpoint.engine.catalog import Catalog, read_manifest
from checkpoint.errors import NoCheckpoint, NotFound
from checkpoint.format.json_fields import Fields, dump_json, parse_json
from checkpoint.format.keys import (
    MAX_STEP,
    TAGS,
    VERIFIED,
    parse_tag_key,
    parse_verified_key,
    score_key,
    tag_key,
    verified_key,
)
from checkpoint.format.manifest import metrics_from_json, metrics_to_json
from checkpoint.lifecycle.survey import digest_of
from checkpoint.store.contract import Store


def tag(store: Store, name: str, step: int) -> None:
    """Name a checkpoint, in place of the one that had the name; it never expires while it has one.

    Raises NoCheckpoint if there is none of this step, FormatError for a name that no key can hold.
    """
    check_store("store", store)
    check_step(step)
    check_kind("name", name, str)
    key = tag_key(name)
    _check_exists(store, step)
    store.put(key, dump_json({"step": step}, key))
    _check_exists(store, step)  # a prune at the same time looks at tags after it expired what it would


def untag(store: Store, name: str) -> None:
    """Take a name away; to take one that is not there is fine."""
    check_store("store", store)
    check_kind("name", name, str)
    store.delete(tag_key(name))


def tags(store: Store) -> dict[str, int]:
    """Return which step each tag names. Raises Corrupt for a tag that cannot be read."""
    check_store("store", store)
    found = {}
    for entry in store.list(TAGS):
        name = parse_tag_key(entry.key)
        if name is None:
            continue
        try:
            fields = Fields(parse_json(store.read(entry.key)[0], entry.key), f"{entry.key} (tag again)")
        except NotFound:
            continue  # taken away since
        found[name] = fields.count("step", MAX_STEP)
    return found


def record_score(store: Store, step: int, metrics: Mapping[str, float]) -> None:
    """Write down what was found out about a checkpoint after it was made; `BestByMetric` goes by it.

    A metric that is recorded again replaces its old value; the others stay. One process at a time scores a
    checkpoint. Raises NoCheckpoint, TypeError naming a metric that is no number.
    """
    check_store("store", store)
    check_step(step)
    check_kind("metrics", metrics, Mapping)
    for name, value in metrics.items():
        check_kind("a metric's name", name, str)
        check_kind(f"metrics[{name!r}]", value, Real)
    _, data = read_manifest(store, step)
    digest = digest_of(data)
    both = {**scores(store, step, digest), **metrics}
    store.put(score_key(step, digest), dump_json(metrics_to_json(both), f"the scores of step {step}"))


def scores(store: Store, step: int, digest: str) -> dict[str, float]:
    """Return what was recorded of a checkpoint, by the digest of its manifest. Raises Corrupt."""
    key = score_key(step, digest)
    try:
        data = store.read(key)[0]
    except NotFound:
        return {}
    return metrics_from_json(parse_json(data, key), key)


def copy_score(source: Store, target: Store, step: int, digest: str) -> None:
    """Bring a checkpoint's scores along to another store."""
    known = scores(source, step, digest)
    if known:
        both = {**known, **scores(target, step, digest)}
        target.put(score_key(step, digest), dump_json(metrics_to_json(both), f"the scores of step {step}"))


def record_verified(store: Store, step: int, digest: str, num_bytes: int) -> None:
    """Write down that a checkpoint was read back and proved just now."""
    store.put(verified_key(step, digest), json.dumps({"num_bytes": num_bytes}).encode())


def forget_verified(store: Store, step: int, digest: str) -> None:
    """Take back that a checkpoint is known to be sound."""
    store.delete(verified_key(step, digest))


def verified(store: Store) -> dict[tuple[int, str], float]:
    """Return which checkpoints (step, digest) were proved, and when, in unix time by the store's clock."""
    found = {}
    for entry in store.list(VERIFIED):
        parsed = parse_verified_key(entry.key)
        if parsed is not None:
            found[parsed.step, parsed.digest] = entry.modified_s
    return found


def _check_exists(store: Store, step: int) -> None:
    if step not in Catalog(store).steps():
        raise NoCheckpoint(f"{store} has no checkpoint of step {step} to name: see `holdfast inspect`")
