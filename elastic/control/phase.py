"""What a run is doing."""

from enum import Enum


class Phase(Enum):
    """What the run is doing."""

    GATHERING = "gathering workers"
    FORMING = "forming a world"
    TRAINING = "training"
    ENDED = "ended"
