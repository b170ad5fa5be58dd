"""Says what to do where a loss uses sharded parameters in a way that torch refuses in its own words."""

from collections.abc import Iterator
from contextlib import contextmanager

from elastic.errors import JobRejected
from elastic.training.blame import UserFailure

_TORCHS_WORDS = (
    "mixed torch.Tensor and DTensor",  # rows of a parameter, beside a whole tensor
    "No backend type associated",  # a sum over rows, or a gathering of them, outside of a layer's forward
    "out of bounds for storage of size 0",  # a gathered parameter is used again that is freed already
)


@contextmanager
def only_through_layers() -> Iterator[None]:
    """Raise JobRejected for what torch says inside of a parameter that is used outside of its layer."""
    try:
        yield
    except UserFailure as failure:
        if not any(words in str(failure) for words in _TORCHS_WORDS):
            raise
        raise JobRejected(
            "the job's loss uses parameters other than by calling the model (as a penalty on the weights or "
            "on gradients does), of which each rank has some rows only: set training.parameter_copies = 0 "
            f"({failure})"
        ) from None
