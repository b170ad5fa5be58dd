"""Refuses an optimizer that mixes elements across a sharded tensor: its update would depend on the shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic.errors import JobRejected

_NO_BACKEND = "No backend type associated"


@contextmanager
def only_elements() -> Iterator[None]:
    """Raise JobRejected when a sharded tensor is reduced inside, or would have to be gathered."""
    try:
        with _NoPartialSums():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield
    except RuntimeError as error:
        if _NO_BACKEND not in str(error):
            raise
        raise _rejected() from None


class _NoPartialSums(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the same
    """Looks at every result: a rank's part of a sum reads as if it were the whole one."""

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
