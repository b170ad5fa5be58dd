"""Names: what frameworks, rules and universal checkpoints call the same tensor. Pure.

A foreign checkpoint calls a weight NAME, a state of the optimizer "optimizer.STATE.NAME", and anything else
"other.PATH". A universal one, as a Checkpointer saves {"model": ..., "optimizer": ...}, calls them
"model/NAME", "optimizer/state/NAME/STATE" and "other/PATH" (or PATH, if that was a path here before); rules,
which know no optimizer's dict, NAME and "optimizer/STATE/NAME".
"""

import re

from checkpoint.errors import Misuse
from checkpoint.interop.formats.contract import is_weight

_FOREIGN_STATE = re.compile(r"optimizer\.(?P<state>[^.]+)\.(?P<parameter>.+)")
_RULE_STATE = re.compile(r"optimizer/(?P<state>[^/]+)/(?P<parameter>.+)")
_UNIVERSAL_STATE = re.compile(r"optimizer/state/(?P<parameter>.+)/(?P<state>[^/]+)")
_OTHER, _MODEL = "other", "model/"


def from_foreign(name: str) -> str:
    """Return the universal name of a foreign tensor."""
    found = _FOREIGN_STATE.fullmatch(name)
    if found:
        return f"optimizer/state/{found['parameter']}/{found['state']}"
    if name.startswith(f"{_OTHER}."):
        path = name.removeprefix(f"{_OTHER}.")
        return path if "/" in path else f"{_OTHER}/{path}"
    return f"{_MODEL}{name}"


def to_foreign(name: str) -> str:
    """Return the foreign name of a universal tensor; `from_foreign` goes back.

    Raises Misuse for a weight whose name would mean something else there.
    """
    found = _UNIVERSAL_STATE.fullmatch(name)
    if found:
        return f"optimizer.{found['state']}.{found['parameter']}"
    if name.startswith(_MODEL):
        weight = name.removeprefix(_MODEL)
        if not is_weight(weight):
            raise Misuse(
                f"the weight {name!r} can go to no other format: names that begin with 'optimizer.' and "
                "'other.' are those of what is no weight. Rename that module, or leave it out (--only)"
            )
        return weight
    return f"{_OTHER}.{name.removeprefix(f'{_OTHER}/')}"


def from_rules(name: str) -> str:
    """Return the universal name of what rules call a global tensor."""
    found = _RULE_STATE.fullmatch(name)
    if found:
        return f"optimizer/state/{found['parameter']}/{found['state']}"
    return f"{_MODEL}{name}"


def rule_name(name: str) -> str:
    """Return what rules call a universal tensor; `from_rules` goes back."""
    found = _UNIVERSAL_STATE.fullmatch(name)
    if found:
        return f"optimizer/{found['state']}/{found['parameter']}"
    return name.removeprefix(_MODEL)
