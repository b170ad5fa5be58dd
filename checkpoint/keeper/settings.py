"""What a keeper is told when it starts, and where on its machine it is found."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from checkpoint.engine.arena import Sizing
from checkpoint.errors import StoreRefused
from checkpoint.lifecycle.policies import Policy, parse_policies, parse_policy, policy_to_text
from checkpoint.lifecycle.tiers import Tier, check_tiers, parse_tier, tier_to_json
from checkpoint.store.open import open_store
from checkpoint.store.places import check_apart


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """The keeper of a run's snapshots on one host.

    It keeps the newest `hold` snapshots in memory; prunes the store by `keep`, if that names any policy; and
    brings checkpoints to the `far` tiers. If it does not answer for `answer_s` it is taken for dead. It ends
    `lease_s` after its last client left, once all it was given is durable, or `flush_s` later in any case.
    `directory` holds its socket, locks and log, and goes with it; by default a private one under the system's
    temporary directory. Another one has to be private too, and to lie in a private one.
    """

    run: str
    host: str
    store_url: str
    arena_bytes: int = 1 << 30
    lease_s: float = 60.0
    flush_s: float = 600.0
    hold: int = 0
    keep: tuple[Policy, ...] = ()
    far: tuple[Tier, ...] = ()
    answer_s: float = 20.0
    start_s: float = 60.0
    directory: Path | None = None
    sizing: Sizing = field(default_factory=Sizing)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", parse_policies(self.keep))
        check_tiers(self.far)
        check_apart([("the store", self.store_url), *((f"tier {far.label!r}", far.url) for far in self.far)])

    @property
    def home(self) -> Path:
        """The keeper's directory, one for each run, host and store; short, as paths of sockets must be."""
        if self.directory is not None:
            return self.directory
        digest = hashlib.sha256("\0".join((self.run, self.host, absolute_url(self.store_url))).encode())
        return Path(tempfile.gettempdir()) / f"holdfast-{os.getuid()}" / digest.hexdigest()[:16]

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self.home / "socket"

    @property
    def log_path(self) -> Path:
        """Where it logs."""
        return self.home / "keeper.log"

    @property
    def start_lock_path(self) -> Path:
        """Held by a client while it looks for a keeper or starts one."""
        return self.home / "start.lock"

    @property
    def life_lock_path(self) -> Path:
        """Held by the keeper as long as it lives; contains its process id."""
        return self.home / "life.lock"


def config_to_text(config: KeeperConfig) -> str:
    """Write what a keeper is told on its command line; its directory is told apart."""
    return json.dumps(
        {
            "run": config.run,
            "host": config.host,
            "store_url": absolute_url(config.store_url),
            "arena_bytes": config.arena_bytes,
            "lease_s": config.lease_s,
            "flush_s": config.flush_s,
            "hold": config.hold,
            "keep": [policy_to_text(policy) for policy in config.keep],
            "far": [tier_to_json(replace(tier, url=absolute_url(tier.url))) for tier in config.far],
            "sizing": asdict(config.sizing),
        }
    )


def parse_config(text: str, directory: Path) -> KeeperConfig:
    """Read what `config_to_text` wrote."""
    fields = json.loads(text)
    keep = tuple(parse_policy(policy) for policy in fields.pop("keep"))
    far = tuple(parse_tier(tier) for tier in fields.pop("far"))
    sizing = Sizing(**fields.pop("sizing"))
    return KeeperConfig(**fields, keep=keep, far=far, sizing=sizing, directory=directory)


def absolute_url(store_url: str) -> str:
    """Return a store's URL in a form that means the same in any working directory and process."""
    if store_url.startswith("memory:"):
        raise StoreRefused(
            f"{store_url} lives in one process only and a keeper is another: "
            "use a path or an object store's URL, or LocalHost instead of a keeper"
        )
    return str(open_store(store_url))
