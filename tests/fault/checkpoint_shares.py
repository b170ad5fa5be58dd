"""Shares of snapshots given to a host by hand, byte by byte: for tests of what hosts do with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpoint import Durable, Host, Outcome
from checkpoint.engine.contract import Content, Depth, Handling, Slot, SnapshotPlan, Ticket
from checkpoint.engine.held import Held
from checkpoint.engine.plan import TensorSpec
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box

Rows = Mapping[str, Any]  # numpy arrays


def handling(
    depth: Depth = "store", *, codec: Codec = Codec.RAW, max_wait_s: float = 20.0, delta_chain: int = 0
) -> Handling:
    """Return how these tests' snapshots are treated, if they do not say otherwise."""
    return Handling(codec, 1, "wait" if max_wait_s else "skip", max_wait_s, depth, delta_chain)


def plan_of(
    rows: Rows, treated: Handling | None = None, *, rank: int = 0, hosts: Sequence[str] = ("local",)
) -> SnapshotPlan:
    """Plan a share of 1-d tensors, cut into as many equal boxes as there are ranks."""
    specs, slots, offset = [], [], 0
    for number, (name, values) in enumerate(rows.items()):
        specs.append(TensorSpec(name, str(values.dtype), values.shape))
        size = len(values) // len(hosts)
        num_bytes = size * values.itemsize
        slots.append(Slot(number, Box((rank * size,), (size,)), offset, num_bytes))
        offset += -(-num_bytes // 64) * 64
    content = Content(tuple(specs), '{"rows": 1}', "digest")
    return SnapshotPlan(
        tuple(hosts), content, {"metrics": {"loss": 0.5}}, treated or handling(), tuple(slots)
    )


def begin(
    host: Host, step: int, rows: Rows, plan: SnapshotPlan, *, rank: int = 0, generation: int = 0
) -> Any:
    """Open a share and fill it; return its ticket, None if it was not taken."""
    ticket = Ticket("run", generation, step, rank)
    space = host.open(ticket, plan)
    if space is None:
        return None
    for slot in plan.slots:
        values = list(rows.values())[slot.tensor][slot.box.start[0] : slot.box.stop[0]]
        space[slot.offset : slot.offset + slot.num_bytes] = values.tobytes()
    return ticket


def give(host: Host, step: int, rows: Rows, treated: Handling | None = None, *, name: str = "local") -> bool:
    """Give a whole snapshot of a world of one; return whether it was taken."""
    ticket = begin(host, step, rows, plan_of(rows, treated, hosts=(name,)))
    if ticket is None:
        return False
    host.seal(ticket)
    return True


def rows_of(step: int, num_bytes: int = 1 << 18) -> dict[str, np.ndarray]:
    """Return a state that is different at every step."""
    generator = np.random.default_rng(step)
    return {
        "w": generator.standard_normal(num_bytes // 4, dtype=np.float32),
        "steps": np.full(4, step, np.int64),
    }


def held_rows(held: Held) -> dict[str, np.ndarray]:
    """Read a held snapshot's tensors out of memory."""
    found = {}
    for number, tensor in enumerate(held.manifest.tensors):
        values = np.zeros(tensor.shape, tensor.dtype)
        for chunk in held.chunks:
            if chunk.tensor == number:
                raw = held.memory[chunk.offset : chunk.offset + chunk.num_bytes]
                part = np.frombuffer(bytes(raw), tensor.dtype)
                values[chunk.box.start[0] : chunk.box.stop[0]] = part
        found[tensor.name] = values
    return found


def same_rows(one: Rows, other: Rows) -> bool:
    """Whether two states are equal, bit by bit."""
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def told(host: Host, seen: list[Outcome]) -> list[tuple[str, str, int]]:
    """List what a host has told up to now: kind, tier and step; `seen` collects the outcomes."""
    seen += host.outcomes()
    return [(type(one).__name__, one.tier if isinstance(one, Durable) else "", one.step) for one in seen]
