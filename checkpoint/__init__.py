"""Checkpoints: captured lazily, committed whole or not at all, proved when read. For any PyTorch loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.contract import Durable, Failed, Host, Outcome, Skipped
from checkpoint.engine.generations import claim_generation, newest_generation
from checkpoint.engine.host import LocalHost
from checkpoint.engine.plan import TensorSpec
from checkpoint.errors import (
    AlreadyExists,
    ArenaFull,
    CheckpointError,
    Conflict,
    Corrupt,
    FormatError,
    Incomplete,
    KeeperLost,
    Mismatch,
    NoCheckpoint,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    Torn,
    Unsupported,
)
from checkpoint.format.codec import Codec
from checkpoint.format.manifest import Manifest
from checkpoint.keeper import KeeperConfig, KeeperHost, connect
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.retention import EverySteps, LatestN, Pinned, PruneReport, prune
from checkpoint.lifecycle.scrub import VerifyReport, verify
from checkpoint.store.contract import Store
from checkpoint.store.open import Probe, open_store, probe

if TYPE_CHECKING:
    from checkpoint.engine.restore import Fallback, Loaded, RestoreReport, check_fits, load
    from checkpoint.engine.save import SavePolicy, Saver, Share
    from checkpoint.engine.tensors import fingerprint_tensor, flatten_state, specs_of, unflatten_state

__all__ = [
    "AlreadyExists",
    "ArenaFull",
    "Catalog",
    "CheckpointError",
    "Codec",
    "Conflict",
    "Corrupt",
    "Durable",
    "EverySteps",
    "Failed",
    "Fallback",
    "FormatError",
    "Host",
    "Incomplete",
    "KeeperConfig",
    "KeeperHost",
    "KeeperLost",
    "LatestN",
    "Loaded",
    "LocalHost",
    "Manifest",
    "Mismatch",
    "NoCheckpoint",
    "NotFound",
    "Outcome",
    "Pinned",
    "Probe",
    "PruneReport",
    "RestoreReport",
    "SavePolicy",
    "Saver",
    "Share",
    "Skipped",
    "Store",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
    "TensorSpec",
    "Torn",
    "Unsupported",
    "VerifyReport",
    "check_fits",
    "claim_generation",
    "connect",
    "fingerprint_tensor",
    "flatten_state",
    "load",
    "newest_generation",
    "open_store",
    "probe",
    "prune",
    "set_aside",
    "specs_of",
    "unflatten_state",
    "verify",
]

# What needs torch is imported when it is first asked for: torch takes a second and 200 MB, and neither the
# keeper's process nor the command line has any use for it.
_WITH_TORCH = {
    **dict.fromkeys(
        ("Fallback", "Loaded", "RestoreReport", "check_fits", "load"), "checkpoint.engine.restore"
    ),
    **dict.fromkeys(("SavePolicy", "Saver", "Share"), "checkpoint.engine.save"),
    **dict.fromkeys(
        ("fingerprint_tensor", "flatten_state", "specs_of", "unflatten_state"), "checkpoint.engine.tensors"
    ),
}


def __getattr__(name: str) -> Any:
    """Import a name that needs torch."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_WITH_TORCH[name]), name)
    globals()[name] = found
    return found
