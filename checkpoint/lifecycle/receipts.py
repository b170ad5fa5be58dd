"""The receipts of a checkpoint, put to the proof: nobody reads them after the commit, yet they lie there."""

from checkpoint.engine.receipt import RECEIPT_SEQ, read_receipt
from checkpoint.errors import FormatError, NotFound
from checkpoint.format.keys import pages_prefix, parse_page_key
from checkpoint.format.manifest import Manifest
from checkpoint.lifecycle.findings import Bad
from checkpoint.store.contract import Store


def damaged_receipts(store: Store, manifest: Manifest) -> tuple[Bad, ...]:
    """Read the receipts of a checkpoint that are there; return those that are not as they were written."""
    found = []
    for entry in store.list(pages_prefix(manifest.generation, manifest.step)):
        page = parse_page_key(entry.key)
        if page is None or page.seq != RECEIPT_SEQ:
            continue
        try:
            read_receipt(store, entry.key)
        except NotFound:
            continue  # it goes when its checkpoint expires
        except FormatError as error:
            why = f"{error}; no restore reads a receipt, and it goes with its checkpoint"
            found.append(Bad(manifest.step, f"the receipt {entry.key}", why, entry.key))
    return tuple(found)
