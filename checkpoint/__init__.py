"""Checkpoints: captured lazily, committed whole or not at all, proved when read. For any PyTorch loop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from checkpoint.engine.catalog import Catalog
from checkpoint.engine.contract import Durable, Failed, Host, Outcome, Skipped
from checkpoint.engine.generations import claim_generation, newest_generation, who_claimed
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
    KeeperBusy,
    KeeperLost,
    Mismatch,
    Misuse,
    NoCheckpoint,
    NoSuchStep,
    NotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    Torn,
    Unsupported,
)
from checkpoint.format.codec import Codec
from checkpoint.format.fingerprint import fingerprinted_by
from checkpoint.format.manifest import Manifest
from checkpoint.format.scheme import parse_layout
from checkpoint.keeper import KeeperConfig, KeeperHost, connect
from checkpoint.keeper.peering.policy import (
    Address,
    Parity,
    PeerPolicy,
    addresses_to_json,
    parse_addresses,
)
from checkpoint.lifecycle.aside import set_aside
from checkpoint.lifecycle.findings import VerifyReport
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
from checkpoint.lifecycle.retention import PruneReport, metric_names, prune
from checkpoint.lifecycle.scrub import verify
from checkpoint.lifecycle.tiers import Tier, check_tiers
from checkpoint.store.contract import Store
from checkpoint.store.open import Probe, open_store, probe
from checkpoint.store.wrappers import Retrying, RetryPolicy

if TYPE_CHECKING:
    from checkpoint.checkpointer import Checkpointer, Fate, Options, Restoration, Rng, Saving
    from checkpoint.engine.likeness import like, to_plain
    from checkpoint.engine.on_ranks import OnRanks
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
    from checkpoint.interop.conversion.casting import parse_dtype
    from checkpoint.interop.conversion.comparing import Compared, Verdict
    from checkpoint.interop.conversion.contract import (
        ConversionReport,
        ConversionSettings,
        Numbering,
        Overflow,
        Progress,
        Proof,
    )
    from checkpoint.interop.conversion.emigrating import Emigration
    from checkpoint.interop.conversion.finding import check_own
    from checkpoint.interop.conversion.foreign import (
        ForeignSummary,
        Whereabouts,
        compare_places,
        export_foreign,
        format_names,
        import_foreign,
        is_store,
        look_at_foreign,
        plan_export_foreign,
        plan_import_foreign,
    )
    from checkpoint.interop.conversion.importing import Adoption
    from checkpoint.interop.conversion.resharding import Change, plan_reshard, reshard
    from checkpoint.interop.conversion.ruled import RuleChoice, choose_rules, rule_names
    from checkpoint.interop.conversion.sharing import RankShare, share_of_rank
    from checkpoint.interop.conversion.tying import parse_ties
    from checkpoint.keeper.peering.source import PeerSource

__all__ = [
    "Address",
    "Adoption",
    "AlreadyExists",
    "ArenaFull",
    "BestByMetric",
    "Catalog",
    "Change",
    "CheckpointError",
    "Checkpointer",
    "Codec",
    "Compared",
    "Conflict",
    "ConversionReport",
    "ConversionSettings",
    "Corrupt",
    "Durable",
    "Emigration",
    "EveryMinutes",
    "EverySteps",
    "Failed",
    "Fallback",
    "Fate",
    "ForeignSummary",
    "FormatError",
    "HeldSource",
    "Host",
    "Incomplete",
    "KeeperBusy",
    "KeeperConfig",
    "KeeperHost",
    "KeeperLost",
    "LatestN",
    "Loaded",
    "LocalHost",
    "Manifest",
    "Mismatch",
    "Misuse",
    "NoCheckpoint",
    "NoSuchStep",
    "NotFound",
    "Numbering",
    "OnRanks",
    "Options",
    "Outcome",
    "Overflow",
    "Pace",
    "Parity",
    "PeerPolicy",
    "PeerSource",
    "PerRank",
    "Pinned",
    "Policy",
    "Probe",
    "Progress",
    "PromoteReport",
    "Proof",
    "PruneReport",
    "RankShare",
    "ReadPolicy",
    "RepairReport",
    "Restoration",
    "RestoreReport",
    "Restored",
    "RetryPolicy",
    "Retrying",
    "Rng",
    "RuleChoice",
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
    "Verdict",
    "VerifyReport",
    "Wanted",
    "Whereabouts",
    "WithinBytes",
    "addresses_to_json",
    "check_fits",
    "check_own",
    "check_tiers",
    "choose_rules",
    "claim_generation",
    "compare_places",
    "connect",
    "export_foreign",
    "fingerprint_tensor",
    "fingerprinted_by",
    "flatten_state",
    "format_names",
    "import_foreign",
    "is_store",
    "like",
    "load",
    "look_at_foreign",
    "metric_names",
    "newest_generation",
    "open_store",
    "parse_addresses",
    "parse_dtype",
    "parse_layout",
    "parse_policy",
    "parse_ties",
    "per_rank_values",
    "plan_export_foreign",
    "plan_import_foreign",
    "plan_reshard",
    "probe",
    "promote",
    "prune",
    "record_score",
    "repair",
    "reshard",
    "restore_into",
    "rule_names",
    "set_aside",
    "share_of_rank",
    "specs_of",
    "tag",
    "tags",
    "to_plain",
    "unflatten_state",
    "untag",
    "verify",
    "who_claimed",
]

# What needs torch is imported when it is first asked for: torch takes a second and 200 MB, and neither the
# keeper's process nor the command line has any use for it.
_WITH_TORCH = {
    **dict.fromkeys(
        ("Checkpointer", "Fate", "Options", "Restoration", "Rng", "Saving"), "checkpoint.checkpointer"
    ),
    **dict.fromkeys(("like", "to_plain"), "checkpoint.engine.likeness"),
    "OnRanks": "checkpoint.engine.on_ranks",
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
_ROOM = "checkpoint.interop.conversion"
_CONVERSIONS = {
    "Adoption": f"{_ROOM}.importing",
    "Emigration": f"{_ROOM}.emigrating",
    "parse_dtype": f"{_ROOM}.casting",
    "parse_ties": f"{_ROOM}.tying",
    **dict.fromkeys(("Compared", "Verdict"), f"{_ROOM}.comparing"),
    **dict.fromkeys(
        ("ConversionReport", "ConversionSettings", "Numbering", "Overflow", "Progress", "Proof"),
        f"{_ROOM}.contract",
    ),
    **dict.fromkeys(
        (
            *("ForeignSummary", "Whereabouts", "compare_places", "export_foreign", "format_names"),
            *("import_foreign", "is_store", "look_at_foreign", "plan_export_foreign", "plan_import_foreign"),
        ),
        f"{_ROOM}.foreign",
    ),
    **dict.fromkeys(("Change", "plan_reshard", "reshard"), f"{_ROOM}.resharding"),
    "check_own": f"{_ROOM}.finding",
    **dict.fromkeys(("RuleChoice", "choose_rules", "rule_names"), f"{_ROOM}.ruled"),
    **dict.fromkeys(("RankShare", "share_of_rank"), f"{_ROOM}.sharing"),
}
_LATER = {**_WITH_TORCH, **_CONVERSIONS}


def __getattr__(name: str) -> Any:
    """Import a name that needs torch, or that only few need."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found
