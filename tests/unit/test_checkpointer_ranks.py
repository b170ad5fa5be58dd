"""What is each rank's own (random states, data loaders) when the world has another size: one rule."""

from typing import Any

import pytest
import torch

from checkpoint.checkpointer.refilling import plan_refill
from checkpoint.engine.catalog import Catalog
from checkpoint.engine.host import LocalHost
from checkpoint.engine.per_rank import PerRank
from checkpoint.engine.restore import restore_into
from checkpoint.engine.save import Saver, Share
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW

NUM_SAVING = 4


@pytest.fixture
def store():
    """What four ranks saved: each its own generator, and its number."""
    made = MemoryStore("ranks")
    with LocalHost(made, arena_bytes=MIB, tuning=QUICK) as host:
        savers = [Saver(host, "run", RAW) for _ in range(NUM_SAVING)]
        for rank, saver in enumerate(savers):
            state = {
                "generator": PerRank(torch.Generator().manual_seed(rank).get_state()),
                "own": PerRank({"rank": rank}),
            }
            saver.save(1, state, Share(0, rank, NUM_SAVING, ("local",) * NUM_SAVING), {})
        assert savers[0].drain(20)
        for saver in savers:
            saver.close()
    return made


def restored(store: MemoryStore, rank: int, size: int) -> tuple[dict[str, Any], Any]:
    """Restore as one rank of a world; the others would do the same."""
    state = {"generator": torch.Generator().manual_seed(77), "own": PerRank({"rank": "here"})}
    refill = plan_refill(state, Catalog(store).manifest(1), (rank, size))
    restore_into(store, [wanted for one in refill.requests for wanted in one.wanted], step=1)
    refill.finish()
    return state, refill


@pytest.mark.parametrize("rank", range(NUM_SAVING))
def test_in_a_world_of_the_same_size_every_rank_gets_what_was_its_own(store, rank):
    state, refill = restored(store, rank, NUM_SAVING)
    expected = torch.Generator().manual_seed(rank).get_state()
    assert torch.equal(state["generator"].get_state(), expected)
    assert state["own"].value == {"rank": rank} and refill.notes == []


@pytest.mark.parametrize("size", [1, 3, 5])
def test_in_a_world_of_another_size_all_is_left_as_it_is_and_told_and_every_rank_s_value_is_at_hand(
    store, size
):
    for rank in range(size):
        state, refill = restored(store, rank, size)
        assert torch.equal(state["generator"].get_state(), torch.Generator().manual_seed(77).get_state())
        assert state["own"].value == {"rank": "here"}
        assert [note.split(" was saved")[0] for note in refill.notes] == ["generator", "own"]
        assert f"saved by 4 ranks, each its own, and {size} are here: left as it is" in refill.notes[0]
        assert "deal anew what Restoration.per_rank['own'] has" in refill.notes[1]
        assert refill.per_rank["own"] == tuple({"rank": number} for number in range(NUM_SAVING))
