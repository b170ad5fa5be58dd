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
lie changes from step to step. So a run of bytes that changed before it was copied is noticed for certain from
128 KiB on, one that changed after from 16 KiB on; a shorter one of n bytes with a probability of about
n / 128 KiB and n / 16 KiB in each snapshot. A single element
written so once is most likely NOT noticed (1 in 256 after it was copied, 1 in 2,048 before); who writes it
at every step is found out within some hundreds. What lies scattered (a transposed tensor) is sampled in two
blocks of 64 elements only. Who writes so has to call `wait_captured` first, as torch optimizers do by
themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoint.engine.contract import Slot
from checkpoint.engine.structure import Origin

LINE_BYTES = 64
BEFORE_BYTES = 128 << 10
AFTER_BYTES = 16 << 10
_NUM_BLOCKS = 2  # sampled of a chunk that is no run of memory
_BLOCK_ELEMENTS = 64
_SPREAD = (
    0x9E3779B97F4A7C15  # the golden ratio's: consecutive lines spread evenly, and differ from step to step
)
Form = Literal["run", "elements"]  # a row of words, or elements that lie apart
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True, slots=True)
class Watch:
    """One chunk to be copied while the next forward and backward run.

    `live` is a view of it: its bits as a row of integers, or its elements where it is no run of memory.
    """

    number: int
    form: Form
    slot: Slot
    live: torch.Tensor
    version: int
    salt: int
    before: tuple[torch.Tensor, ...]
    memory: torch.UntypedStorage  # and how large it was, and where, when the snapshot was asked for
    memory_bytes: int
    address: int

    def captured(self, space: memoryview) -> torch.Tensor:
        """Return the chunk's place in a region, in the form of `live`."""
        raw = space[self.slot.offset : self.slot.offset + self.slot.num_bytes]
        return torch.frombuffer(raw, dtype=self.live.dtype).view(self.live.shape)

    def absence(self) -> str | None:
        """Say so if the chunk's memory is no longer what it was: to read it could end the process."""
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


def watch(own: torch.Tensor, origin: Origin, slot: Slot, number: int, salt: int) -> Watch:
    """Begin to watch over a chunk of the rank's own tensor, at places that `salt` chooses."""
    live = own.detach()
    memory = live.untyped_storage()
    version = -1 if live.is_inference() else live._version
    if origin.first is not None and live.is_contiguous() and not (live.is_conj() or live.is_neg()):
        form: Form = "run"
        words = live.as_strided((live.numel(),), (1,)).view(_WORDS[live.element_size()])
        scale = words.numel() // max(live.numel(), 1)
        live = words[origin.first * scale : (origin.first + origin.box.numel) * scale]
    else:
        form = "elements"
        live = live[tuple(map(slice, origin.box.start, origin.box.stop))]
    before = tuple(sample.clone() for sample in _samples(live, form, salt, BEFORE_BYTES))
    return Watch(number, form, slot, live, version, salt, before, memory, memory.nbytes(), memory.data_ptr())


def _samples(chunk: torch.Tensor, form: Form, salt: int, every_bytes: int) -> Iterator[torch.Tensor]:
    """Yield views of a few elements: the same ones of a chunk and of its copy."""
    if form == "run":
        yield _lines(chunk, salt * _SPREAD & 0xFFFFFFFFFFFFFFFF, every_bytes // chunk.element_size())
        return
    for block in range(_NUM_BLOCKS):
        yield _block(chunk, (salt * _NUM_BLOCKS + block) * _SPREAD & 0xFFFFFFFFFFFFFFFF)


def _lines(row: torch.Tensor, place: int, every: int) -> torch.Tensor:
    """Return one line of each `every` elements of a row, at the same place in each."""
    width = min(LINE_BYTES // row.element_size(), row.numel())
    start = place % (min(every, row.numel()) - width + 1)
    return row[start:].unfold(0, width, every)


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
