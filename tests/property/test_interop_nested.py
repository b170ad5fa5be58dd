"""Random nested states of torch.save come back from a store as they were: every container, key and value."""

import math
import random
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import Adoption, Emigration, Numbering, Whereabouts
from checkpoint.errors import CheckpointError

# Words that mean something here, or to frameworks; prefixes of wrappers ("module.") are left out of names.
WORDS = (
    *("model", "optimizer", "state_dict", "state", "param_groups", "epoch", "step", "tied", "containers"),
    *("files", "config", "other", "extra", "net", "ema", "optim", "args", "zero", "a", "b.c", "x/y", "0"),
)
PLAIN: tuple[Any, ...] = (
    1,
    2.5,
    "text",
    None,
    True,
    [1, 2],
    ["a", None],
    {},
    [],
    {"k": 1},
    {"k": {"z": [1]}},
    math.inf,
    b"x",
)
NUM_STATES = 100


class Maker:
    """Makes states, each of them by one seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._bits = torch.Generator().manual_seed(seed)

    def state(self) -> dict[Any, Any]:
        """Return a state of some entries."""
        return {key: self._node(1) for key in self._chance.sample(WORDS, self._chance.randint(1, 4))}

    def _tensor(self) -> torch.Tensor:
        shape = self._chance.choice([(), (2,), (2, 3), (0, 4)])
        kind = self._chance.choice([torch.float32, torch.bfloat16])
        return torch.randn(shape, generator=self._bits).to(kind)

    def _model(self) -> dict[str, Any]:
        layers = self._chance.sample(("l1.weight", "l1.bias", "l2.weight", "m.bias"), 2)
        return {name: self._tensor() for name in layers}

    def _optimizer(self) -> dict[str, Any]:
        names: list[Any] = [0, 1] if self._chance.random() < 0.5 else ["p0.w", "p1.w"]
        state = {name: {"step": torch.tensor(1.0), "exp_avg": self._tensor()} for name in names}
        return {"state": state, "param_groups": [{"lr": 0.1, "params": names}]}

    def _node(self, depth: int) -> Any:
        kind = self._chance.random()
        if depth > 3 or kind < 0.25:
            return self._tensor()
        if kind < 0.45:
            return self._chance.choice(PLAIN)
        if kind < 0.55:
            return self._model()
        if kind < 0.62:
            return self._optimizer()
        if kind < 0.7:
            return [self._node(depth + 1) for _ in range(self._chance.randint(1, 3))]
        keys = [
            self._chance.choice([word, word, self._chance.randint(1, 5)])
            for word in self._chance.sample(WORDS, 3)
        ]
        return {key: self._node(depth + 1) for key in keys}


def difference(one: Any, other: Any, where: str = "") -> str:
    """Say where two states differ first; names of parameters may be added."""
    if isinstance(one, dict) and isinstance(other, dict):
        if odd := {key for key in one.keys() ^ other.keys() if key != "param_names"}:
            return f"{where}: {odd}"
        pairs = [(f"{where}[{key!r}]", item, other[key]) for key, item in one.items()]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{n}]", *both) for n, both in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if one.dtype == other.dtype and torch.equal(one, other) else where
    else:
        return "" if type(one) is type(other) and one == other else f"{where}: {one!r}, {other!r}"
    return next(filter(None, (difference(a, b, spot) for spot, a, b in pairs)), "")


@pytest.mark.parametrize("first", range(0, NUM_STATES, 10))
def test_nested_states_come_back_as_they_were(first, tmp_path):
    num_back = 0
    for seed in range(first, first + 10):
        state = Maker(seed).state()
        url, folder = str(tmp_path / f"{seed}.pt"), tmp_path / str(seed)
        torch.save(state, url)
        store = checkpoint.open_store(str(folder / "store"))
        try:
            checkpoint.import_foreign(url, store, Adoption(numbering=Numbering.BY_ORDER))
            source, target = Whereabouts(str(store)), str(folder / "out")
            checkpoint.export_foreign(source, target, Emigration("torch"))
        except CheckpointError:  # a name that is there twice, or states of nobody: refused, by name
            continue
        back = torch.load(f"{target}/checkpoint.pt", weights_only=True)
        added = {"step", "tied"} - state.keys()  # what an export tells of itself
        assert not difference(state, {key: item for key, item in back.items() if key not in added}), seed
        num_back += 1
    assert num_back >= 5, "most are no refusals"
