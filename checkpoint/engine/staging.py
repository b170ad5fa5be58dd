"""The small tensors of a share, copied while `save` runs: thousands of them in one batched copy per type.

What is copied at once needs no guard, and cannot be torn. It lies as it will in the share's region, so that
the capture thread moves it there in one piece (on CUDA: one transfer instead of thousands).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from checkpoint.engine.structure import Structure
from checkpoint.engine.tensors import torch_dtype
from checkpoint.engine.transfer import Transfer


@dataclass(slots=True)
class _Bay:
    """One device's part: its buffer lies from `offset` on in the region."""

    offset: int
    buffer: torch.Tensor
    batches: dict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = field(default_factory=dict)


class Staging:
    """Buffers for the small chunks of one structure, used again at every save of it."""

    def __init__(self, structure: Structure) -> None:
        self._bays: list[_Bay] = []
        slots = structure.slots[: structure.num_eager]
        devices = [structure.devices[slot.tensor] for slot in slots]
        for device in dict.fromkeys(devices):
            first = devices.index(device)
            last = first + devices.count(device)
            end = slots[last].offset if last < len(slots) else structure.eager_bytes
            offset = slots[first].offset
            bay = _Bay(offset, torch.empty(end - offset, dtype=torch.uint8, device=device))
            for slot in slots[first:last]:
                raw = bay.buffer[slot.offset - offset :][: slot.num_bytes]
                dtype = torch_dtype(structure.specs[slot.tensor].dtype)
                places, leaves = bay.batches.setdefault(dtype, ([], []))
                places.append(raw.view(dtype).reshape(slot.box.size))
                leaves.append(slot.tensor)
            self._bays.append(bay)

    def take(self, own: Sequence[torch.Tensor]) -> None:
        """Copy the rank's own tensors as they are now; on CUDA behind what their stream does."""
        with torch.no_grad():
            for bay in self._bays:
                for places, leaves in bay.batches.values():
                    torch._foreach_copy_(places, [own[leaf] for leaf in leaves])

    def put(self, space: memoryview, transfer: Transfer) -> None:
        """Move what was taken to the beginning of a region; on CUDA the transfer may still be under way."""
        for bay in self._bays:
            target = torch.frombuffer(space[bay.offset :][: bay.buffer.numel()], dtype=torch.uint8)
            transfer.copy(target, bay.buffer)
