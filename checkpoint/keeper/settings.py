"""What a keeper is told when it starts, and where on its machine it is found."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import StoreRefused
from checkpoint.store.open import open_store


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """The keeper of a run's snapshots on one host.

    It ends `lease_s` after its last client left, once all it was given is durable, or `flush_s` later in any
    case. `directory` holds its socket, locks and log, and goes with it; by default a private one under the
    system's temporary directory. Another one has to be private too, and to lie in a private one.
    """

    run: str
    host: str
    store_url: str
    arena_bytes: int = 1 << 30
    lease_s: float = 60.0
    flush_s: float = 600.0
    start_s: float = 60.0
    directory: Path | None = None

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


def absolute_url(store_url: str) -> str:
    """Return a store's URL in a form that means the same in any working directory and process."""
    if store_url.startswith("memory:"):
        raise StoreRefused(
            f"{store_url} lives in one process only and a keeper is another: "
            "use a path or an object store's URL, or LocalHost instead of a keeper"
        )
    return str(open_store(store_url))
