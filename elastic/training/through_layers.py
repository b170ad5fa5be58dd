"""Says what to do where a loss uses sharded parameters in a way that torch does not name, or even allows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from elastic.errors import JobRejected
from elastic.training.blame import UserFailure
from elastic.training.readings import no_readings

_TORCHS_WORDS = (
    "mixed torch.Tensor and DTensor",  # rows of a parameter, beside a whole tensor
    "No backend type associated",  # a sum over rows, or a gathering of them, outside of a layer's forward
    "out of bounds for storage of size 0",  # a gathered parameter is used again that is freed already
)


@contextmanager
def only_through_layers(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Raise JobRejected for what torch says inside of a parameter that is used outside of its layer, and for
    numbers that are read from one.
    """
    try:
        with no_readings("loss", parameters):
            yield
    except UserFailure as failure:
        if not any(words in str(failure) for words in _TORCHS_WORDS):
            raise
        raise JobRejected(
            "the job's loss uses parameters other than by calling the model (as a penalty on the weights or "
            "on gradients does), of which each rank has some rows only: set training.parameter_copies = 0 "
            f"({failure})"
        ) from None
