"""The stand-alone interface: checkpoints of what a training loop has, alone or on many ranks."""

from checkpoint.checkpointer.checkpointer import Checkpointer
from checkpoint.checkpointer.options import Options
from checkpoint.checkpointer.restoring import Restoration
from checkpoint.checkpointer.rng import Rng
from checkpoint.checkpointer.saving import Fate, Saving

__all__ = ["Checkpointer", "Fate", "Options", "Restoration", "Rng", "Saving"]
