"""The flat partitions that ZeRO gives each rank, and their bytes, block by block."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint.format.box import boxes_of_run, split_box
from checkpoint.format.dtypes import itemsize
from checkpoint.format.flat import plan_flat
from checkpoint.format.layout import FlatGroup
from checkpoint.interop.formats.contract import Contents
from checkpoint.interop.formats.deepspeed_parts import Shape
from checkpoint.interop.formats.deepspeed_writing import Parts
from checkpoint.interop.formats.rounding import widen_bits
from checkpoint.interop.formats.saving import Later
from checkpoint.interop.formats.streams import block_bytes, blocks_of
from checkpoint.interop.moves import Foreign

_ALIGNMENT = 2  # elements to which DeepSpeed aligns each rank's partition (nccl_start_alignment_factor)


@dataclass(frozen=True, slots=True)
class Run:
    """Elements first, ..., stop - 1 of a tensor of the contents, raveled, and zeros after them."""

    number: int
    first: int
    stop: int
    num_zeros: int = 0


@dataclass(frozen=True, slots=True)
class Partition:
    """A rank's partition of one state of a group: runs end to end, and zeros after them."""

    runs: tuple[Run, ...]
    num_zeros: int = 0
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return sum(run.stop - run.first + run.num_zeros for run in self.runs) + self.num_zeros


class Partitions:
    """The blocks of what a file holds: partitions by the number that they were given, or tensors."""

    def __init__(self, contents: Contents, budget_bytes: int) -> None:
        self._contents, self._budget_bytes = contents, budget_bytes
        self._partitions: dict[int, Partition] = {}

    def later(self, partition: Partition) -> Later:
        """Return a partition as a tensor to write; tensors of the contents have their own numbers."""
        number = len(self._contents.tensors) + len(self._partitions)
        self._partitions[number] = partition
        return Later(number, partition.dtype, (partition.numel,))

    def blocks(self, number: int) -> Iterator[memoryview]:
        """Yield the bytes of a partition, or of a tensor of the contents; an empty tensor has no number."""
        if number in self._partitions:
            yield from self._bytes_of(self._partitions[number])
        elif number >= 0:
            yield from blocks_of(self._contents, number, self._budget_bytes)

    def _bytes_of(self, partition: Partition) -> Iterator[memoryview]:
        width = itemsize(partition.dtype)
        for run in partition.runs:
            tensor = self._contents.tensors[run.number]
            for whole in boxes_of_run(tensor.shape, run.first, run.stop):
                for box in split_box(whole, width, block_bytes(self._budget_bytes)):
                    bits = self._contents.read(run.number, box)
                    wide = bits if tensor.dtype == partition.dtype else widen_bits(bits, tensor.dtype)
                    yield memoryview(wide.reshape(-1).view("u1").data)
            yield from _zeros(run.num_zeros * width)
        yield from _zeros(partition.num_zeros * width)


def flat_partition(
    parts: Parts, state: str, members: Mapping[str, Shape], place: tuple[int, int]
) -> Partition:
    """Return a rank's equal run of a group's parameters, laid end to end, as ZeRO-1 and 2 do."""
    rank, world = place
    plan = plan_flat(
        FlatGroup(tuple(members), ("shard",), part_multiple=_ALIGNMENT),
        {name: math.prod(shape) for name, shape in members.items()},
        world,
    )
    begin, runs = rank * plan.part_length, []
    for name, shape in members.items():
        first = max(0, begin - plan.starts[name])
        stop = min(math.prod(shape), begin + plan.part_length - plan.starts[name])
        if first < stop:
            runs.append(Run(parts.states[name][state], first, stop))
    held = sum(run.stop - run.first for run in runs)
    return Partition(tuple(runs), plan.part_length - held)


def divided_partition(
    parts: Parts, state: str, members: Mapping[str, Shape], place: tuple[int, int]
) -> Partition:
    """Return a rank's parts of parameters that are divided each by itself, as ZeRO-3 does."""
    runs = [_part(parts.states[name][state], math.prod(shape), place) for name, shape in members.items()]
    return Partition(tuple(runs))


def frozen_partition(tensor: Foreign, number: int, place: tuple[int, int]) -> Partition:
    """Return a rank's part of a weight that is not trained."""
    return Partition((_part(number, math.prod(tensor.shape), place),), dtype=tensor.dtype)


def _part(number: int, numel: int, place: tuple[int, int]) -> Run:
    rank, world = place
    length = -(-numel // world)
    first, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return Run(number, first, stop, length - (stop - first))


def _zeros(num_bytes: int) -> Iterator[memoryview]:
    if num_bytes:
        yield memoryview(bytes(num_bytes))
