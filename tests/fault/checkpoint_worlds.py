"""States, worlds and comparisons that the checkpoint engine's tests share."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Protocol, TypeVar

import pytest
import torch

from checkpoint import (
    Catalog,
    Durable,
    NoCheckpoint,
    Outcome,
    SavePolicy,
    Saver,
    Share,
    Store,
    flatten_state,
    load,
    verify,
)
from checkpoint.engine.pipeline import Tuning
from checkpoint.format.codec import Codec

QUICK = Tuning(poll_s=0.02, fenced_patience_s=0.3, straggler_s=0.3, outage_s=0.0)
RAW = SavePolicy(codec=Codec.RAW)
MIB = 1 << 20


class Closable(Protocol):
    """What is to be closed."""

    def close(self) -> object:
        """End."""


Closed = TypeVar("Closed", bound=Closable)


def small_state(step: int) -> dict[str, Any]:
    """A state of a few tensors that is different at every step, with Python values and a tied weight."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(64, 33, generator=generator)
    return {
        "model": {"weight": weight, "tied": weight, "bias": torch.randn(7, generator=generator).bfloat16()},
        "optimizer": {"exp_avg": torch.full((3, 5), float("nan")), "step": torch.tensor(float(step))},
        "cursor": {"step": step, "seen": (1, 2.5, None)},
        "empty": torch.empty(0, 4),
    }


def run_state(step: int, scale: int = 1) -> dict[str, Any]:
    """A state of which some stays as it is, some drifts in a few bits and some is new at every step."""
    steady = torch.Generator().manual_seed(0)
    weight = torch.randn(5000 * scale, generator=steady)
    return {
        "frozen": torch.randn(4000 * scale, generator=steady),
        "drifting": (weight * (1 + step * 2**-9)).bfloat16(),
        "moment": torch.randn(300 * scale, generator=torch.Generator().manual_seed(step)),
        "step": step,
    }


def same_bits(one: Any, other: Any) -> bool:
    """Whether two states hold the same names, dtypes, shapes, bits and Python values."""
    skeletons, tensors = zip(flatten_state(one), flatten_state(other), strict=True)
    return skeletons[0] == skeletons[1] and _bits(tensors[0]) == _bits(tensors[1])


def _bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def durable_steps(outcomes: tuple[Outcome, ...]) -> list[int]:
    """List the steps that were acknowledged."""
    return sorted({outcome.step for outcome in outcomes if isinstance(outcome, Durable)})


def save_alone(
    saver: Saver, step: int, generation: int = 0, *, share: Share | None = None
) -> tuple[Outcome, ...]:
    """Save one step of a world of one and wait for its outcome."""
    saver.save(step, small_state(step), share or Share.alone(generation=generation), {})
    assert saver.drain(20)
    return saver.outcomes()


def assert_whole(
    store: Store, acknowledged: Collection[int], state_of: Callable[[int], Any] = small_state
) -> None:
    """Prove that every checkpoint that exists is whole, and every acknowledged one exists."""
    steps = Catalog(store).steps()
    assert set(acknowledged) <= set(steps)
    assert Catalog(store).latest() == (max(steps) if steps else None)
    for step in steps:
        assert same_bits(load(store, step).state, state_of(step))
    if steps:
        assert load(store).manifest.step == max(steps) and load(store).report.fallbacks == ()
        assert verify(store).is_sound
    else:
        with pytest.raises(NoCheckpoint):
            load(store)


def save_steps(saver: Saver, states: Mapping[int, Any]) -> None:
    """Save states of a world of one, one after the other; all have to become durable."""
    for step, state in states.items():
        saver.save(step, state, Share.alone(), {})
        assert saver.drain(20)
        assert durable_steps(saver.outcomes()) == [step]


@contextmanager
def closing_all(make: Callable[..., Closed]) -> Iterator[Callable[..., Closed]]:
    """Lend a maker of things; in the end all that it made are closed, the last first."""
    with ExitStack() as made:

        def make_one(*args: Any, **options: Any) -> Closed:
            return made.enter_context(closing(make(*args, **options)))

        yield make_one


def at_once(actions: list[Callable[[], None]]) -> None:
    """Run actions in threads of their own, and wait for all of them; raise what one of them raised."""
    errors: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 -- raised below, in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
