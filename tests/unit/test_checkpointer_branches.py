"""Going back on purpose, and other runs: nothing is lost silently, and nothing is loaded by mistake."""

import socket
from dataclasses import replace

import pytest
import torch

from checkpoint.checkpointer import Checkpointer, Options
from checkpoint.checkpointer.world import World
from checkpoint.engine.reading import ReadPolicy
from checkpoint.errors import Conflict, Mismatch, NoCheckpoint, StoreUnavailable
from checkpoint.format.keys import ABANDONED
from checkpoint.lifecycle.marks import tag
from checkpoint.lifecycle.tiers import Tier
from checkpoint.store.open import open_store

SMALL = Options(arena_mib=8)


def saved(checkpointer: Checkpointer, steps: range, fill: float = 0.0) -> dict[str, torch.Tensor]:
    """Save some steps, each with its own content, and wait until they are durable."""
    state = {"weight": torch.zeros(3)}
    for step in steps:
        state["weight"].fill_(fill + step)
        checkpointer.save(step, state)
        assert checkpointer.wait()
    return state


def test_after_going_back_the_first_save_is_refused_until_it_is_said_what_becomes_of_the_newer_ones(tmp_path):
    with Checkpointer(f"memory://{tmp_path}", every=2, options=SMALL) as checkpointer:
        state = saved(checkpointer, range(2, 7))
        restored = checkpointer.restore(state, step=2)
        assert restored is not None and (state["weight"] == 2).all()
        assert "checkpoints newer than the restored step 2 stay (steps 4, 6)" in restored.notes[0]
        with pytest.raises(Conflict, match=r"restore\(state, step=2, newer=\"set aside\"\)"):
            checkpointer.save(3, state)  # not even due: at once, not after an hour
        assert checkpointer.latest() == 6
        checkpointer.restore(state)
        assert checkpointer.save(8, state) is not None


def test_what_is_set_aside_is_kept_and_told_and_training_goes_on_from_the_older_step(tmp_path):
    url = f"memory://{tmp_path}"
    with Checkpointer(url, options=SMALL) as checkpointer:
        state = saved(checkpointer, range(1, 5))
        restored = checkpointer.restore(state, step=2, newer="set aside")
        assert restored is not None and "steps 3, 4" in restored.notes[0] and ABANDONED in restored.notes[0]
        assert checkpointer.latest() == 2
        saved(checkpointer, range(3, 4), fill=100)
        again = checkpointer.restore(state)
        assert again is not None and again.step == 3 and (state["weight"] == 103).all()
        store = open_store(url)
        kept = [entry.key for entry in store.list(ABANDONED) if not entry.key.endswith(".json")]
        assert [int(key.removeprefix(ABANDONED)[:12]) for key in kept] == [3, 4]
        store.put_new("manifests/000000000004", bytes(store.read(kept[1])[0]))  # taken back by hand
        back = checkpointer.restore(state)
        assert back is not None and back.step == 4 and (state["weight"] == 4).all()


def test_the_newest_is_never_newer_than_itself_and_a_missing_step_sets_nothing_aside(tmp_path):
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as checkpointer:
        state = saved(checkpointer, range(1, 3))
        restored = checkpointer.restore(state, step=2)
        assert restored is not None and restored.notes == ()
        assert checkpointer.save(3, state) is not None
        with pytest.raises(NoCheckpoint):
            checkpointer.restore(state, step=0, newer="set aside")
        assert checkpointer.wait() and checkpointer.latest() == 3


def test_a_tagged_checkpoint_is_not_set_aside_and_neither_are_the_others(tmp_path):
    url = f"memory://{tmp_path}"
    with Checkpointer(url, options=SMALL) as checkpointer:
        state = saved(checkpointer, range(1, 5))
        tag(open_store(url), "release", 3)
        with pytest.raises(Conflict, match="step 3 is tagged 'release'"):
            checkpointer.restore(state, step=2, newer="set aside")
        assert checkpointer.latest() == 4


def test_the_abandoned_branch_is_set_aside_on_every_tier(tmp_path):
    tmp_path.chmod(0o700)
    far = Tier(str(tmp_path / "far"), every=2, name="far")
    options = Options(tiers=(far,), arena_mib=2, lease_s=0.3, directory=tmp_path / "keeper")
    with Checkpointer(str(tmp_path / "near"), options=options) as checkpointer:
        state = {"weight": torch.zeros(3)}
        checkpointer.save(1, state)
        saving = checkpointer.save(2, state)
        assert saving is not None and saving.durable("far").result(30).step == 2
        checkpointer.restore(state, step=1, newer="set aside")
        for store in (open_store(str(tmp_path / "near")), open_store(far.url)):
            assert len(store.list(ABANDONED)) == 2 and not store.list("manifests/000000000002")


def test_another_run_s_checkpoint_is_refused_by_name_unless_it_is_meant(tmp_path):
    url = f"memory://{tmp_path}"
    with Checkpointer(url, run="theirs", options=SMALL) as checkpointer:
        saved(checkpointer, range(1, 2))
    state = {"weight": torch.zeros(3)}
    with Checkpointer(url, run="mine", options=SMALL) as checkpointer:
        with pytest.raises(Mismatch, match=r"of run 'theirs', and this is run 'mine'.*run='theirs'"):
            checkpointer.restore(state)
        assert (state["weight"] == 0).all()
        assert checkpointer.restore(state, run="theirs") is not None and (state["weight"] == 1).all()


def test_a_store_that_has_newer_steps_is_told_at_the_first_save_and_not_after_it(tmp_path):
    url = f"memory://{tmp_path}"
    with Checkpointer(url, options=SMALL) as checkpointer:
        state = saved(checkpointer, range(1, 4))
    with Checkpointer(url, every=2, options=SMALL) as checkpointer:  # a notebook's cell, run again
        with pytest.raises(Conflict, match=r"has step 3 already: restore\(state\) first"):
            checkpointer.save(1, state)
        assert checkpointer.save(4, state) is not None
    with Checkpointer(url, options=SMALL) as checkpointer:
        restored = checkpointer.restore(state)
        assert restored is not None and restored.step == 4
        with pytest.raises(Conflict, match=r"step 3 is not newer than step 4, which was restored"):
            checkpointer.save(3, state)
        assert checkpointer.save(5, state) is not None


def test_a_first_save_into_another_run_s_store_is_refused_and_both_ways_out_lead_out(tmp_path):
    url = f"memory://{tmp_path}"
    with Checkpointer(url, run="a", options=SMALL) as checkpointer:
        state = saved(checkpointer, range(1, 4))
    with Checkpointer(url, run="b", options=SMALL) as checkpointer:
        refused = r"of run 'a' \(the newest is step 3\).*run 'b'.*store of its own.*restore\(state, run='a'\)"
        for step in (2, 4):
            with pytest.raises(Conflict, match=refused):
                checkpointer.save(step, state)
        assert checkpointer.restore(state, run="a") is not None
        saved(checkpointer, range(4, 6))
        assert checkpointer.latest() == 5
    with Checkpointer(f"{url}-own", run="b", options=SMALL) as checkpointer:
        assert checkpointer.save(1, state) is not None


def test_a_step_that_was_asked_for_is_restored_beside_a_tier_that_never_answers_and_nothing_is_set_aside(
    tmp_path, monkeypatch
):
    url, near = str(tmp_path / "near"), Options(kept="in this process", arena_mib=8)
    with Checkpointer(url, options=near) as checkpointer:
        state = saved(checkpointer, range(1, 5))
    reading = ReadPolicy(patience_s=0.1, empty_patience_s=0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        options = Options(tiers=(Tier("s3://bucket/far", name="far"),), reading=reading)
        with Checkpointer(url, options=options) as checkpointer:
            restored = checkpointer.restore(state, step=2)
            assert restored is not None and (state["weight"] == 2).all()
            assert restored.report.unreached == ("far",) and "steps 3, 4" in restored.notes[0]
            assert "whether far has checkpoints newer than the restored step 2" in restored.notes[1]
            with pytest.raises(StoreUnavailable, match="far did not answer, and so nothing was set aside"):
                checkpointer.restore(state, step=2, newer="set aside")
            with pytest.raises(Conflict, match="set aside"):
                checkpointer.save(3, state)
            with pytest.raises(StoreUnavailable, match=r"step 9 .* far may have it"):
                checkpointer.restore(state, step=9)
            assert checkpointer.latest() == 4
        with (
            Checkpointer(str(tmp_path / "empty"), options=options) as checkpointer,
            pytest.raises(StoreUnavailable, match="far may have some"),
        ):
            checkpointer.restore(state)


def test_ranks_that_ask_for_different_steps_are_told_so(tmp_path, monkeypatch):
    def agreed(_: World, say):
        mine = say()
        return [mine, replace(mine, asked=(None, "keep"))]

    state = {"w": torch.zeros(3)}
    with Checkpointer(str(tmp_path), options=Options(kept="in this process", arena_mib=8)) as checkpointer:
        checkpointer.save(1, state)
        assert checkpointer.wait(30)
        monkeypatch.setattr(World, "agreed", agreed)
        with pytest.raises(Mismatch, match="ask for different steps"):
            checkpointer.restore(state, step=1)
