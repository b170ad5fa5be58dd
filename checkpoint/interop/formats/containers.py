"""Where the things of a nested state lay: plain data beside it, by which they are put there again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoint.interop.formats.optimizer_dicts import Keys
from checkpoint.interop.formats.spots import Spot, is_spot
from checkpoint.interop.formats.told import HYPER

CONTAINERS = "containers"  # in `extra`
# What `extra` has of its own: what a state calls by such a name is kept apart.
RESERVED = frozenset({CONTAINERS, "optimizer", "files", "max_shard_bytes", "extra", HYPER})


@dataclass(slots=True)
class Containers:
    """Where model and optimizer are, and everything whose name does not tell."""

    model: Spot = ("model",)
    optimizer: Spot = ("optimizer",)
    dcp_keys: Keys | None = None  # what the optimizer of a dcp called its parameters
    torch_keys: Keys | None = None  # the same, of a file of torch.save
    kept: dict[str, Any] = field(default_factory=dict)  # plain data that `extra` has no name for
    placed: dict[str, Spot] = field(default_factory=dict)  # of plain data, if it is not at the root
    spots: dict[str, Spot] = field(default_factory=dict)  # of tensors, by their names
    inside: dict[str, Spot] = field(default_factory=dict)  # the same, of those within the optimizer

    def told(self) -> dict[str, Any]:
        """Return it as plain data, without what is not needed."""
        keys = {name: getattr(self, name).value for name in _KEYS if getattr(self, name)}
        many = {name: getattr(self, name) for name in _MANY if getattr(self, name)}
        return {"model": [*self.model], "optimizer": [*self.optimizer], **keys, **many}


def containers_of(extra: Mapping[str, Any]) -> Containers | None:
    """Return what plain data tell of containers; None if nothing, or if somebody else chose the name."""
    told = extra.get(CONTAINERS)
    if not isinstance(told, dict) or not all(_is_sound(name, value) for name, value in told.items()):
        return None
    keys = {name: Keys(told[name]) for name in _KEYS if name in told}
    return Containers(**{**told, **keys})


def _are_spots(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_spot, value.values()))


_KEYS = ("dcp_keys", "torch_keys")
_MANY: Mapping[str, Callable[[Any], bool]] = {
    "kept": lambda value: isinstance(value, dict),
    **dict.fromkeys(("placed", "spots", "inside"), _are_spots),
}
_SOUND: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "optimizer"), is_spot),
    **dict.fromkeys(_KEYS, lambda value: value in [each.value for each in Keys]),
    **_MANY,
}


def _is_sound(name: Any, value: Any) -> bool:
    return name in _SOUND and _SOUND[name](value)
