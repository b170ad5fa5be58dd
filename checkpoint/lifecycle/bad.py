"""One finding of a scrub."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bad:
    """Something that is not as it was written: a manifest, a page, a pack, a chunk, a tensor, a receipt.

    `key` is of the object that is to blame; empty if the objects are as they were, but do not add up.
    """

    step: int
    item: str
    why: str
    key: str = ""
