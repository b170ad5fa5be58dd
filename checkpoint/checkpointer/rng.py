"""The random states of a process, as something that a checkpoint can hold: one of its own for every rank."""

import random
from typing import Any

import numpy as np
import torch

from checkpoint.errors import Corrupt


class Rng:
    """Stands for all random generators that code draws from by default: Python's, numpy's, torch's.

    Put one into the state that is saved and restored. Generators of your own (`torch.Generator`) go in by
    themselves.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states as plain data."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        return {
            "python": random.getstate(),
            "numpy": (
                str(kind),
                torch.from_numpy(np.array(keys)),
                int(position),
                int(has_gauss),
                float(gauss),
            ),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the generators back to where they were. Raises Corrupt."""
        try:
            kind, keys, position, has_gauss, gauss = state["numpy"]
            random.setstate(state["python"])
            np.random.set_state((kind, keys.numpy(), position, has_gauss, gauss))
            torch.set_rng_state(state["torch"])
            if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise Corrupt(f"the checkpoint's random states cannot be put back: {error}") from error
