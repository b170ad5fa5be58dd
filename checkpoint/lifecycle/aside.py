"""Setting a checkpoint aside, so that its step can be saved anew: the policies "damaged" and "abandoned"."""

from contextlib import suppress
from typing import Literal

from checkpoint.engine.bounds import check_one_of, check_step, check_store
from checkpoint.engine.catalog import Catalog
from checkpoint.engine.receipt import RECEIPT_SEQ
from checkpoint.errors import AlreadyExists, Conflict, FormatError, NotFound
from checkpoint.format.codec import checksum
from checkpoint.format.json_fields import dump_json
from checkpoint.format.keys import INDEX, abandoned_key, damaged_key, manifest_key, parse_page_key
from checkpoint.store.contract import Buffer, Store

Policy = Literal["damaged", "abandoned"]
_KEYS = {"damaged": damaged_key, "abandoned": abandoned_key}


def set_aside(store: Store, step: int, why: str, *, policy: Policy = "damaged") -> bool:
    """Move a checkpoint's manifest to `control/damaged/` or `control/abandoned/`; False if the step has none.

    Its packs and pages stay, as orphans; its receipts go, or a save in the same generation would be content
    with them. It ends the same if it is called again after it broke off. Call it where one process restores
    and before any saves: it does not ask whether the checkpoint was saved anew in the meantime. Raises
    Conflict if the copy does not read back; then the manifest stays.
    """
    check_store("store", store)
    check_step(step)
    check_one_of("policy", policy, tuple(_KEYS))
    key = manifest_key(step)
    try:
        data = store.read(key)[0]
    except NotFound:
        return False
    copy = _KEYS[policy](step, checksum(data).hex())
    with suppress(AlreadyExists):
        store.put_new(f"{copy}.json", dump_json({"policy": policy, "step": step, "why": why}, "the reason"))
    _copy(store, copy, data)
    for receipt in _receipts(store, step):
        store.delete(receipt)
    store.delete(key)
    return True


def _copy(store: Store, key: str, data: Buffer) -> None:
    with suppress(AlreadyExists):
        store.put_new(key, data)
    if bytes(store.read(key)[0]) != bytes(data):
        raise Conflict(f"{key} does not read back as what was to be set aside: remove it, then try again")


def _receipts(store: Store, step: int) -> list[str]:
    """List the receipts the manifest was made of; of all generations if it does not tell its own."""
    try:
        generation = Catalog(store).manifest(step).generation
    except FormatError:
        generation = None
    return [
        entry.key
        for entry in store.list(INDEX)
        if (page := parse_page_key(entry.key)) is not None
        and (page.step, page.seq) == (step, RECEIPT_SEQ)
        and generation in (None, page.generation)
    ]
