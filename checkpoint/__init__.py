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
from checkpoint.keeper.peering.policy import (
    Address,
    Parity,
    PeerPolicy,
    addresses_to_json,
    parse_addresses,
)
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.marks import record_score, tag, tags, untag
from checkpoint.lifecycle.pace import Pace
from checkpoint.lifecycle.policies import (
    BestByMetric,
    EveryMinutes,
    EverySteps,
    LatestN,
    Pinned,
    Policy,
    WithinBytes,
    parse_policy,
)
from checkpoint.lifecycle.promotion import PromoteReport, promote
from checkpoint.lifecycle.repair import RepairReport, repair
from checkpoint.lifecycle.retention import PruneReport, prune
from checkpoint.lifecycle.scrub import VerifyReport, verify
from checkpoint.lifecycle.tiers import Tier, check_tiers
from checkpoint.store.contract import Store
from checkpoint.store.open import Probe, open_store, probe

if TYPE_CHECKING:
    from checkpoint.checkpointer import Checkpointer, Fate, Options, Restoration, Rng, Saving
    from checkpoint.engine.per_rank import PerRank, per_rank_values
    from checkpoint.engine.reading import ReadPolicy
    from checkpoint.engine.restore import (
        Fallback,
        Loaded,
        Restored,
        RestoreReport,
        check_fits,
        load,
        restore_into,
    )
    from checkpoint.engine.save import SavePolicy, Saver, Share
    from checkpoint.engine.source import HeldSource, StoreSource
    from checkpoint.engine.targets import Wanted
    from checkpoint.engine.tensors import fingerprint_tensor, flatten_state, specs_of, unflatten_state
    from checkpoint.keeper.peering.source import PeerSource

__all__ = [
    "Address",
    "AlreadyExists",
    "ArenaFull",
    "BestByMetric",
    "Catalog",
    "CheckpointError",
    "Checkpointer",
    "Codec",
    "Conflict",
    "Corrupt",
    "Durable",
    "EveryMinutes",
    "EverySteps",
    "Failed",
    "Fallback",
    "Fate",
    "FormatError",
    "HeldSource",
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
    "Options",
    "Outcome",
    "Pace",
    "Parity",
    "PeerPolicy",
    "PeerSource",
    "PerRank",
    "Pinned",
    "Policy",
    "Probe",
    "PromoteReport",
    "PruneReport",
    "ReadPolicy",
    "RepairReport",
    "Restoration",
    "RestoreReport",
    "Restored",
    "Rng",
    "SavePolicy",
    "Saver",
    "Saving",
    "Share",
    "Skipped",
    "Store",
    "StoreError",
    "StoreRefused",
    "StoreSource",
    "StoreUnavailable",
    "TensorSpec",
    "Tier",
    "Torn",
    "Unsupported",
    "VerifyReport",
    "Wanted",
    "WithinBytes",
    "addresses_to_json",
    "check_fits",
    "check_tiers",
    "claim_generation",
    "connect",
    "fingerprint_tensor",
    "flatten_state",
    "load",
    "newest_generation",
    "open_store",
    "parse_addresses",
    "parse_policy",
    "per_rank_values",
    "probe",
    "promote",
    "prune",
    "record_score",
    "repair",
    "restore_into",
    "set_aside",
    "specs_of",
    "tag",
    "tags",
    "unflatten_state",
    "untag",
    "verify",
]

# What needs torch is imported when it is first asked for: torch takes a second and 200 MB, and neither the
# keeper's process nor the command line has any use for it.
_WITH_TORCH = {
    **dict.fromkeys(
        ("Checkpointer", "Fate", "Options", "Restoration", "Rng", "Saving"), "checkpoint.checkpointer"
    ),
    **dict.fromkeys(("PerRank", "per_rank_values"), "checkpoint.engine.per_rank"),
    "ReadPolicy": "checkpoint.engine.reading",
    "Wanted": "checkpoint.engine.targets",
    "PeerSource": "checkpoint.keeper.peering.source",
    **dict.fromkeys(("HeldSource", "StoreSource"), "checkpoint.engine.source"),
    **dict.fromkeys(
        ("Fallback", "Loaded", "RestoreReport", "Restored", "check_fits", "load", "restore_into"),
        "checkpoint.engine.restore",
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
