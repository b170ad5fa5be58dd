"""What `plan` tells of a rank is what a restore of that rank then reads."""

import random
from typing import Any

import numpy as np
import pytest

from checkpoint.engine.plan import TensorSpec
from checkpoint.engine.restore import RestoreReport, restore_into
from checkpoint.engine.targets import Wanted
from checkpoint.format.codec import Codec
from checkpoint.format.flat import share_of
from checkpoint.format.layout import Box, split_box
from checkpoint.format.scheme import parse_layout
from checkpoint.interop.conversion.roles import lay_out
from checkpoint.interop.conversion.sharing import share_of_rank
from checkpoint.store.local import LocalStore
from checkpoint.store.memory import MemoryStore
from tests.restore_samples import Manner, random_bits, random_cuts, write_cut

SHAPES = {
    "model/h.0.attn.qkv.weight": (3072, 128),
    "model/h.0.attn.o_proj.weight": (700, 300),
    "model/h.1.mlp.fc1.weight": (1, 2000, 64),
    "model/h.1.norm.bias": (24,),
    "model/wte.weight": (5000, 40),
}
SPECS = [TensorSpec(name, "float32", shape) for name, shape in SHAPES.items()]
LAYOUTS = (
    "replica=1",
    "shard=3",
    "shard=7",
    "replica=5,zero=3",
    "replica=2,shard=2,tensor=2",
    "tensor=4",
    "pipeline=2,tensor=3",
)


@pytest.fixture(params=["direct", "plain"])
def store(request, tmp_path) -> Any:
    """A store that reads into the caller's memory, and one that does not."""
    return LocalStore(tmp_path) if request.param == "direct" else MemoryStore()


def restored(store: Any, to: str, rank: int, step: int) -> RestoreReport:
    """Restore the boxes of a rank of a layout, each into memory of its own."""
    share = share_of(lay_out(SPECS, parse_layout(to)), dict(SHAPES), rank)
    boxes = [(name, part.box) for name in SHAPES for part in share[name] if not part.box.is_empty]
    wanted = [
        Wanted(name, "float32", SHAPES[name], box, np.zeros(box.numel * 4, np.uint8).data)
        for name, box in boxes
    ]
    return restore_into(store, wanted, step=step).report


def check(store: Any, step: int) -> None:
    for to in LAYOUTS:
        for rank in {0, parse_layout(to).mesh.size - 1}:
            planned, report = share_of_rank(store, to, rank, step=step), restored(store, to, rank, step)
            assert (planned.read_bytes, planned.num_ranges) == (report.num_bytes, report.num_requests), to
            assert sum(pack.num_bytes for pack in planned.packs) == planned.read_bytes
            assert report.num_detours == 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_chunks_are_a_plan_tells_what_a_restore_reads(store, seed):
    chance = random.Random(seed)

    def cut(tensors: dict[str, Any]) -> dict[str, list[Box]]:
        return {name: random_cuts(chance, Box.whole(bits.shape), 3) for name, (_, bits) in tensors.items()}

    def codec() -> Codec:
        return chance.choice([Codec.RAW, Codec.RAW, Codec.PLANES])

    tensors = {name: ("float32", random_bits(chance, "float32", shape)) for name, shape in SHAPES.items()}
    boxes = cut(tensors)
    first = write_cut(store, 1, tensors, boxes, Manner(codec, num_packs=chance.randint(1, 3)))
    check(store, 1)
    changed = {
        name: (dtype, bits ^ np.uint32(chance.randint(0, 1))) for name, (dtype, bits) in tensors.items()
    }
    write_cut(store, 2, changed, boxes, Manner(codec, num_packs=2, earlier=first))
    check(store, 2)


def test_of_chunks_that_are_stored_as_they_are_only_the_blocks_that_are_needed_count(store):
    chance = random.Random(7)
    tensors = {name: ("float32", random_bits(chance, "float32", shape)) for name, shape in SHAPES.items()}
    boxes = {name: split_box(Box.whole(shape), 4, 3 << 19) for name, shape in SHAPES.items()}
    write_cut(store, 1, tensors, boxes)
    check(store, 1)
    planned = share_of_rank(store, "shard=7", 1)
    assert planned.num_bytes <= planned.read_bytes < 0.6 * planned.stored_bytes
