"""What Megatron-Core's distributed checkpoints call a tensor, and what a world of one rank would. Pure.

A key of theirs holds all layers of a block ("decoder.layers.mlp.linear_fc1.weight"), or all experts, in
leading dims; or each has a key with its number. The halves of a gated layer may have keys of their own (`_w`,
`_v`). Ranks know "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight", as the rules do.
"""

import re
from dataclasses import dataclass
from enum import Enum

_MASTERS = ("param", "fp32_param")
_STATE = re.compile(r"(?:chained_[0-9]+\.)?optimizer\.state\.([^.]+)\.(.+)")
_LAYERS = re.compile(r"((?:.+\.)?layers)\.(?![0-9]+\.)(.+)")
_EXPERTS = re.compile(r"(.+\.experts)\.experts\.(.+)")
_NUMBERED = re.compile(r"([0-9]+)\.(.+)")
_HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")
_ONE_LAYER = re.compile(r"((?:.+\.)?layers)\.([0-9]+)\.(.+)")
_ONE_EXPERT = re.compile(r"(.+\.experts)\.local_experts\.([0-9]+)\.(.+)")
_OWN_STATE = re.compile(r"optimizer\.([^.]+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Sharded:
    """A key taken apart: the name with a "{}" for each leading dim of its tensor that counts something."""

    name: str
    num_counted: int
    state: str = ""  # of the optimizer, if it is one of those
    half: str = ""  # "w" for the first of two halves, "v" for the second

    def filled(self, numbers: tuple[int, ...]) -> str:
        """Return the name of one layer, one expert of a layer, or of all there is."""
        name = self.name
        for number in numbers:
            name = name.replace("{}", str(number), 1)
        return f"optimizer.{self.state}.{name}" if self.state else name


def take_apart(key: str) -> Sharded:
    """Return what a key of a tensor says."""
    state, name, num_counted, half = "", key.replace("{", "("), 0, ""  # braces mark places here
    if found := _STATE.fullmatch(name):
        state, name = "master" if found[1] in _MASTERS else found[1], found[2]
    if found := _LAYERS.fullmatch(name):
        name, num_counted = f"{found[1]}.{{}}.{found[2]}", 1
    if found := _EXPERTS.fullmatch(name):
        expert = _NUMBERED.fullmatch(found[2])
        number, rest = (expert[1], expert[2]) if expert else ("{}", found[2])
        name, num_counted = f"{found[1]}.local_experts.{number}.{rest}", num_counted + (expert is None)
    if found := _HALF.fullmatch(name):
        name, half = found[1], found[2]
    return Sharded(name, num_counted, state, half)


class Layers(Enum):
    """How layers are kept: a leading dim counts those of a block, or each has keys of its own."""

    STACKED = "stacked"
    NUMBERED = "numbered"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a rank's tensor goes: into which key, at which place of its leading dims."""

    key: str
    numbers: tuple[int, ...]


def put_together(name: str, layers: Layers) -> Slot:
    """Return the key that holds a tensor of a world of one rank, perhaps beside other layers and experts."""
    numbers: tuple[int, ...] = ()
    state, name = _state_of(name)
    if layers is Layers.STACKED and (found := _ONE_LAYER.fullmatch(name)):
        name, numbers = f"{found[1]}.{found[3]}", (int(found[2]),)
    if found := _ONE_EXPERT.fullmatch(name):
        name, numbers = f"{found[1]}.experts.{found[3]}", (*numbers, int(found[2]))
    return Slot(f"optimizer.state.{state}.{name}" if state else name, numbers)


def _state_of(name: str) -> tuple[str, str]:
    """Return which state of an optimizer a tensor is ("" for none), as Megatron calls it, and of which."""
    found = _OWN_STATE.fullmatch(name)
    return ("", name) if not found else ("param" if found[1] == "master" else found[1], found[2])
