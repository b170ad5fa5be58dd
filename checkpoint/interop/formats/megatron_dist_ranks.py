"""Which weights each model rank of Megatron-Core's has, in its model's order: layers, experts, ends. Pure.

Where experts are spread over ranks, they have an optimizer of their own (the second of a chain), whose model
ranks are counted by themselves: tensor ranks first, then expert ranks, then stages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from checkpoint.errors import Unsupported

TIED = "embedding.word_embeddings.weight"
_LAST, _FIRST = "output_layer.weight", "embedding."
_LAYER = re.compile(r"decoder\.layers\.([0-9]+)\..+")
_EXPERT = re.compile(r".+\.experts\.local_experts\.([0-9]+)\..+")


class Kind(Enum):
    """Which parameters an optimizer has."""

    ALL = "all"
    DENSE = "dense"  # all but the experts that are spread over ranks
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Share:
    """What one model rank has of a (virtual) stage: `stage` of `stages`, and the like."""

    tensor: int
    tensors: int
    expert: int
    experts: int
    stage: int
    stages: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks there are of each kind; `chunks` are the virtual stages of each."""

    tensors: int
    stages: int
    chunks: int = 1
    experts: int = 1
    expert_tensors: int = 1

    def of(self, kind: Kind) -> "Ranks":
        """Return the ranks that the optimizer of some parameters counts."""
        return (
            replace(self, tensors=self.expert_tensors) if kind is Kind.EXPERTS else replace(self, experts=1)
        )

    @property
    def num_models(self) -> int:
        """How many model ranks there are."""
        return self.tensors * self.experts * self.stages

    def share(self, rank: int, chunk: int, kind: Kind) -> Share:
        """Return what the model rank of this number has."""
        rest, tensor = divmod(rank, self.tensors)
        stage, expert = divmod(rest, self.experts)
        stages = self.stages * self.chunks
        return Share(tensor, self.tensors, expert, self.experts, chunk * self.stages + stage, stages, kind)


def order_of(names: Sequence[str], share: Share) -> list[int]:
    """Return the numbers of the weights that a rank has. Raises Unsupported for stages that are not equal."""
    layers = {number: int(match[1]) for number, name in enumerate(names) if (match := _LAYER.fullmatch(name))}
    experts = {n: int(match[1]) for n, name in enumerate(names) if (match := _EXPERT.fullmatch(name))}
    count = 1 + max(layers.values(), default=-1)
    if count % share.stages:
        raise Unsupported(f"{count} layers are not in {share.stages} equal stages")
    each = count // share.stages
    first = [n for n, name in enumerate(names) if n not in layers and name.startswith(_FIRST)]
    last = [n for n, name in enumerate(names) if n not in layers and not name.startswith(_FIRST)]
    mine = sorted(
        (n for n in layers if layers[n] // each == share.stage), key=lambda n: (layers[n], experts.get(n, -1))
    )
    is_last = share.stage == share.stages - 1
    order = [*(first if share.stage == 0 else ()), *mine, *(last if is_last else ())]
    if share.kind is Kind.ALL:
        return order
    if share.kind is Kind.DENSE:
        return [number for number in order if number not in experts]
    most = 1 + max(experts.values(), default=-1)
    if most % share.experts:
        raise Unsupported(f"{most} experts are not on {share.experts} ranks in equal parts")
    own = most // share.experts
    return [number for number in order if number in experts and experts[number] // own == share.expert]


def has_copy(names: Sequence[str], share: Share) -> bool:
    """Tell whether a rank has a copy of the tied embedding, behind all of its own."""
    is_last = share.stages > 1 and share.stage == share.stages - 1
    return is_last and share.kind is not Kind.EXPERTS and _LAST not in names
