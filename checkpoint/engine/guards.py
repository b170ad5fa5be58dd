"""Guards against torn snapshots: what a chunk looked like when it was asked for, and whether it still does.

An optimizer changes state in place, so what is copied late may be half of one step and half of the next.
What is known for certain:
- Chunks up to 128 KiB, up to 8 MiB of a share, are no matter of guards: `save` copies them before it returns.
- A write that moves the tensor's version counter: torch's own in-place operations do.
- Memory that was given back or moved since (`absence`), before it would be read.
- A step of a torch optimizer: it waits (`snapshot`).

What moves no counter - fused optimizers, `.data`, numpy - is known by samples: 64-byte lines of each chunk
are taken when the snapshot is asked for, one in every 128 KiB, and the captured copy has to equal them; and
when the capture ends, the copy and the live tensor have to agree in one line of every 16 KiB. Where the lines
lie, and by how much less than that they are apart, changes from step to step. So a run of bytes that changed
before it was copied is noticed for certain from 128 KiB on, one that changed after from 16 KiB on (from twice
that where two stretches of up to 64 chunks meet, each of which has lines of its own); a shorter one of n
bytes with a probability of about n / 128 KiB and n / 16 KiB in each snapshot. A single element written so
once is most likely NOT noticed (1 in 256 after it was copied, 1 in 2,048 before); who writes it at every step
is found out within some hundreds. What lies scattered (a transposed tensor) is sampled in two
blocks of 64 elements only. Who writes so has to call `wait_captured` first, as torch optimizers do by
themselves.

`save` pays for what is taken: chunks that lie side by side are sampled together, into memory that is kept. A
new process, or one whose allocator gave its memory back, would wait for each fresh page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from checkpoint.engine.contract import Slot
from checkpoint.engine.structure import Structure

LINE_BYTES = 64
BEFORE_BYTES = 128 << 10
AFTER_BYTES = 16 << 10
_MOST_CHUNKS = 64  # watched over together: what is read of them in the end stays small, 1 MiB
_SHARE_VARIED = 16  # by so small a share the distance between lines varies
_NUM_BLOCKS = 2  # sampled of a chunk that is no run of memory
_BLOCK_ELEMENTS = 64
_SPREAD = (
    0x9E3779B97F4A7C15  # the golden ratio's: consecutive lines spread evenly, and differ from step to step
)
Form = Literal["run", "elements"]  # a row of words, or elements that lie apart
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True, slots=True)
class Watch:
    """Chunks of one tensor that are to be copied while the next forward and backward run.

    They lie side by side, in the tensor and in the region. `live` is a view of them: their bits as a row of
    integers; or, of one chunk that is no run of memory, its elements.
    """

    numbers: range
    slots: tuple[Slot, ...]
    form: Form
    live: torch.Tensor
    version: int
    salt: int
    before: tuple[torch.Tensor, ...]
    memory: torch.UntypedStorage  # and how large it was, and where, when the snapshot was asked for
    memory_bytes: int
    address: int

    def captured(self, space: memoryview) -> torch.Tensor:
        """Return the chunks' place in a region, in the form of `live`."""
        raw = space[self.slots[0].offset : _end(self.slots[-1])]
        return torch.frombuffer(raw, dtype=self.live.dtype).view(self.live.shape)

    def chunks(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of each chunk, and the index by which it is found in `live` and in its copy."""
        if self.form == "elements":
            yield self.numbers[0], ...
            return
        begin = 0
        for number, slot in zip(self.numbers, self.slots, strict=True):
            end = begin + slot.num_bytes // self.live.element_size()
            yield number, slice(begin, end)
            begin = end

    def absence(self) -> str | None:
        """Say so if the chunks' memory is no longer what it was: to read it could end the process."""
        if self.memory.nbytes() != self.memory_bytes or self.memory.data_ptr() != self.address:
            return "its memory was given back"
        return None

    def contradiction(self, captured: torch.Tensor) -> str | None:
        """Say what proves that the captured copy is not the state that was to be saved."""
        if absence := self.absence():
            return absence
        if self.version >= 0 and self.live._version != self.version:
            return f"its version counter moved from {self.version} to {self.live._version}"
        copies = _samples(captured, self.form, self.salt, BEFORE_BYTES)
        for before, copy in zip(self.before, copies, strict=True):
            if not _is_same(before, copy):
                return "sampled elements differ from those at the time of the save"
        copies = _samples(captured, self.form, self.salt, AFTER_BYTES)
        for live, copy in zip(_samples(self.live, self.form, self.salt, AFTER_BYTES), copies, strict=True):
            if not _is_same(live, copy):
                return "sampled elements changed after they were copied"
        return None


class Guards:
    """Watches over the chunks of one structure that `save` does not copy itself.

    Keeps the memory for samples: what a snapshot's watches hold is good until those of the next are made.
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._stretches = list(_stretches(structure))
        self._rooms: dict[int, torch.Tensor] = {}

    def watch(self, own: Sequence[torch.Tensor], salt: int) -> tuple[Watch, ...]:
        """Begin to watch over the rank's own tensors, at places that `salt` chooses."""
        with torch.no_grad():
            return tuple(one for numbers in self._stretches for one in self._watched(own, numbers, salt))

    def _watched(self, own: Sequence[torch.Tensor], numbers: range, salt: int) -> Iterator[Watch]:
        origin = self._structure.origins[numbers[0]]
        live = own[origin.leaf].detach()
        if origin.first is not None and live.is_contiguous() and not (live.is_conj() or live.is_neg()):
            words = live.as_strided((live.numel(),), (1,)).view(_WORDS[live.element_size()])
            scale = words.numel() // max(live.numel(), 1)
            numel = sum(self._structure.origins[number].box.numel for number in numbers)
            row = words[origin.first * scale : (origin.first + numel) * scale]
            yield self._watch(numbers, "run", row, salt + numbers[0])
            return
        for number in numbers:
            box = self._structure.origins[number].box
            elements = live[tuple(map(slice, box.start, box.stop))]
            yield self._watch(range(number, number + 1), "elements", elements, salt + number)

    def _watch(self, numbers: range, form: Form, live: torch.Tensor, salt: int) -> Watch:
        memory, version = live.untyped_storage(), -1 if live.is_inference() else live._version
        samples = _samples(live, form, salt, BEFORE_BYTES)
        before = tuple(self._kept(numbers[0], one) if form == "run" else one.clone() for one in samples)
        slots = self._structure.slots[numbers.start : numbers.stop]
        return Watch(
            numbers, slots, form, live, version, salt, before, memory, memory.nbytes(), memory.data_ptr()
        )

    def _kept(self, number: int, sample: torch.Tensor) -> torch.Tensor:
        """Copy a sample to where that of the same chunks was at the save before."""
        room = self._rooms.get(number)
        if room is None or room.numel() < sample.numel():
            most = sample.numel() + sample.numel() // (_SHARE_VARIED // 2) + LINE_BYTES
            room = self._rooms[number] = torch.empty(most, dtype=sample.dtype, device=sample.device)
        return room[: sample.numel()].view(sample.shape).copy_(sample)


def _stretches(structure: Structure) -> Iterator[range]:
    """Yield the numbers of the late chunks: together those that lie side by side."""
    first = structure.num_eager
    for number in range(first + 1, len(structure.slots) + 1):
        if number - first == _MOST_CHUNKS or not _is_beside(structure, number):
            yield range(first, number)
            first = number


def _is_beside(structure: Structure, number: int) -> bool:
    """Whether a chunk begins where the one before it ends, in its tensor and in the region."""
    if number == len(structure.slots):
        return False
    before, origin = structure.origins[number - 1], structure.origins[number]
    is_next = before.first is not None and origin.first == before.first + before.box.numel
    is_one = (before.leaf, _end(structure.slots[number - 1])) == (origin.leaf, structure.slots[number].offset)
    return is_next and is_one


def _end(slot: Slot) -> int:
    return slot.offset + slot.num_bytes


def _samples(chunk: torch.Tensor, form: Form, salt: int, every_bytes: int) -> Iterator[torch.Tensor]:
    """Yield views of a few elements: the same ones of a chunk and of its copy."""
    if form == "run":
        yield _lines(chunk, salt * _SPREAD & 0xFFFFFFFFFFFFFFFF, every_bytes // chunk.element_size())
        return
    for block in range(_NUM_BLOCKS):
        yield _block(chunk, (salt * _NUM_BLOCKS + block) * _SPREAD & 0xFFFFFFFFFFFFFFFF)


def _lines(row: torch.Tensor, place: int, every: int) -> torch.Tensor:
    """Return one line of each `every` elements of a row, or of a few less: else all were in one column."""
    width = min(LINE_BYTES // row.element_size(), row.numel())
    step = every - (place >> 40) % (every // _SHARE_VARIED)
    start = place % (min(step, row.numel()) - width + 1)
    return row[start:].unfold(0, width, step)


def _block(chunk: torch.Tensor, place: int) -> torch.Tensor:
    """Return some neighbouring elements of a chunk."""
    at: list[int | slice] = []
    for size in chunk.shape[:-1]:
        place, chosen = divmod(place, size)
        at.append(chosen)
    if chunk.dim():
        start = place % max(chunk.shape[-1] - _BLOCK_ELEMENTS + 1, 1)
        at.append(slice(start, start + _BLOCK_ELEMENTS))
    return chunk[tuple(at)]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(_bits(one), _bits(other))


def _bits(sample: torch.Tensor) -> torch.Tensor:
    """Return a sample's bits on the CPU, so that NaN equals itself and -0 does not equal 0."""
    if not sample.dtype.is_floating_point and not sample.is_complex():
        return sample.cpu()
    plain = sample.resolve_conj().resolve_neg().cpu().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
