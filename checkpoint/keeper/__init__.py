"""The keeper: one process per run and host that holds its snapshots, and outlives the trainers."""

from checkpoint.keeper.client import KeeperHost, connect
from checkpoint.keeper.settings import KeeperConfig

__all__ = ["KeeperConfig", "KeeperHost", "connect"]
