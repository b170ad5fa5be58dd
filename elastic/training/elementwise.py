"""Refuses an optimizer that mixes elements across a sharded tensor: its update would depend on the shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic.errors import JobRejected
from elastic.training.blame import explain

_NO_BACKEND = "No backend type associated"
_NO_RULE = ("does not have a sharding strategy", "require placement changes")


@contextmanager
def only_elements() -> Iterator[None]:
    """Raise JobRejected when a sharded tensor would have to be gathered inside, or when torch has no rule for
    what is done to it.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_BACKEND in str(error):
            raise _rejected() from None
        if any(words in str(error) for words in _NO_RULE):
            raise JobRejected(
                "torch cannot apply the job's optimizer to rows of a tensor: make it with foreach=False and "
                f"fused=False, take another one, or set training.parameter_copies = 0 ({explain(error)})"
            ) from None
        raise


class NoPartialSums(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Raises JobRejected when a sharded tensor is reduced inside, even to one shard. Looks at every result,
    which is slow.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, DTensor) and any(placement.is_partial() for placement in each.placements):
                raise _rejected()
        return out


def _rejected() -> JobRejected:
    return JobRejected(
        "the job's optimizer does not treat elements one by one (it takes a norm or a mean of a tensor, or "
        "multiplies matrices), which rows of it cannot: set training.parameter_copies = 0"
    )
