"""A real keeper's memory outlives its trainer and is read by the next; a keeper that hangs is replaced."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from checkpoint import KeeperConfig, KeeperLost, Saver, Share, connect, load, open_store
from checkpoint.engine.contract import Outcome
from checkpoint.keeper.home import end_hung
from tests.fault.checkpoint_shares import begin, give, handling, held_rows, plan_of, rows_of, same_rows, told
from tests.fault.checkpoint_worlds import MIB, durable_steps, same_bits, small_state

pytestmark = pytest.mark.slow

MEMORY = handling("memory")


@pytest.fixture
def config(tmp_path):
    config = KeeperConfig(
        run="run",
        host="h0",
        store_url=str(tmp_path / "store"),
        arena_bytes=4 * MIB,
        lease_s=20.0,
        hold=2,
        directory=tmp_path / "keeper",
    )
    yield config
    with suppress(OSError, ValueError):
        os.kill(keeper_pid(config), signal.SIGKILL)


def keeper_pid(config: KeeperConfig) -> int:
    return int(config.life_lock_path.read_text())


def state_of(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0].replace("Z", "gone")
    return "gone"


def stop(pid: int) -> None:
    """Stop a process, and see it stop: on another core it runs on for a moment, and may answer."""
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: state_of(pid) == "T")


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_new_trainer_reads_what_its_killed_predecessor_captured_out_of_the_keeper_s_memory(
    config, tmp_path
):
    trainer = subprocess.Popen([sys.executable, "-m", "tests.fault.checkpoint_holder", str(tmp_path)])
    diary = tmp_path / "diary"
    assert eventually(lambda: diary.exists() and len(diary.read_text().split("\n")) > 8)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    captured = int(diary.read_text().split("\n")[-2])  # the last line may be cut, or late
    with connect(config) as host, host.held() as held:
        assert held is not None
        assert held.manifest.step in (captured, captured + 1)
        assert same_rows(held_rows(held), rows_of(held.manifest.step))
        assert held.manifest.run == "run" and held.manifest.metrics == {"loss": 0.5}
    assert not (tmp_path / "store" / "packs").exists() and not (tmp_path / "store" / "manifests").exists()


def test_what_a_trainer_reads_stays_while_it_reads_and_goes_when_it_leaves(config):
    single = replace(config, hold=1, arena_bytes=MIB)
    rows = rows_of(1, 3 << 18)
    with connect(single) as reader, connect(single) as writer:
        assert give(writer, 1, rows, MEMORY, name="h0")
        with reader.held() as held:
            assert held is not None
            assert not give(writer, 2, rows_of(2, 3 << 18), handling("memory", max_wait_s=0.0), name="h0")
            assert same_rows(held_rows(held), rows)
            with writer.held() as again:
                assert again is not None and again.manifest.step == 1
        with reader.held():
            reader.close()
        assert give(writer, 3, rows_of(3, 3 << 18), MEMORY, name="h0")
        assert writer.pressure().num_skipped == 1 and writer.pressure().most_bytes <= MIB


def test_memory_that_is_read_while_its_keeper_dies_is_read_to_the_end(config):
    with connect(config) as host:
        give(host, 1, rows_of(1), MEMORY, name="h0")
        with host.held() as held:
            os.kill(keeper_pid(config), signal.SIGKILL)
            assert eventually(lambda: host._link.is_lost)
            assert held is not None and same_rows(held_rows(held), rows_of(1))
        with host.held() as held:
            assert held is None


def test_a_keeper_that_stopped_is_given_up_killed_and_replaced_within_one_capture(config):
    hasty = replace(config, answer_s=0.5)
    with connect(hasty) as host:
        saver = Saver(host, "run")
        saver.save(1, small_state(1), Share.alone("h0"), {})
        assert saver.drain(20) and durable_steps(saver.outcomes()) == [1]
        pid = keeper_pid(hasty)
        stop(pid)
        saver.save(2, small_state(2), Share.alone("h0"), {})
        assert saver.wait_captured() < 20
        assert state_of(pid) == "gone" and keeper_pid(hasty) != pid
        assert saver.drain(20)
        assert durable_steps(saver.outcomes()) == [2]
        saver.close()
    assert same_bits(load(open_store(hasty.store_url)).state, small_state(2))


def test_a_snapshot_that_a_stopped_keeper_had_not_made_durable_is_reported_failed(config):
    hasty = replace(config, answer_s=0.5)
    with connect(hasty) as host:
        seen: list[Outcome] = []
        partner = plan_of(rows_of(1), hosts=("h0", "elsewhere"))  # waits for another host's receipt
        host.seal(begin(host, 1, rows_of(1), partner, generation=1))
        stop(keeper_pid(hasty))
        with pytest.raises(KeeperLost, match="did not answer for"):
            give(host, 2, rows_of(2), MEMORY, name="h0")
        assert give(host, 2, rows_of(2), MEMORY, name="h0")
        assert eventually(lambda: ("Failed", "", 1) in told(host, seen))


def test_a_keeper_that_is_busy_is_waited_for_longer_than_its_answers_may_take(config):
    hasty = replace(config, hold=1, arena_bytes=MIB, answer_s=2.5)
    with connect(hasty) as reader, connect(hasty) as writer:
        give(writer, 1, rows_of(1, 3 << 18), MEMORY, name="h0")
        with reader.held():
            began_s = time.monotonic()
            taken = give(writer, 2, rows_of(2, 3 << 18), handling("memory", max_wait_s=4.0), name="h0")
            assert not taken and time.monotonic() - began_s > 3.5
        assert give(writer, 3, rows_of(3, 3 << 18), MEMORY, name="h0")


def test_a_trainer_that_starts_finds_a_stopped_keeper_and_replaces_it(config):
    hasty = replace(config, answer_s=0.5)
    connect(hasty).close()
    pid = keeper_pid(hasty)
    stop(pid)
    with connect(hasty) as host:
        assert keeper_pid(hasty) != pid and state_of(pid) == "gone"
        assert give(host, 1, rows_of(1), MEMORY, name="h0")


def test_only_the_keeper_of_this_very_directory_is_ever_killed(config, tmp_path):
    other = replace(config, directory=tmp_path / "other")
    with connect(config), connect(other):
        own, pid = keeper_pid(config), keeper_pid(other)
        config.life_lock_path.write_text(str(pid))  # as if the process id had been used anew
        assert end_hung(config) is None
        assert state_of(pid) != "gone"
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        config.life_lock_path.write_text(str(stranger.pid))
        assert end_hung(config) is None and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        for keeper in (own, pid):
            os.kill(keeper, signal.SIGKILL)


def test_a_state_of_which_only_values_change_is_described_once(config):
    with connect(config) as host:
        rows = rows_of(1)
        plan = plan_of(rows, MEMORY, hosts=("h0",))
        for step in (1, 2, 3):
            host.seal(begin(host, step, rows, plan))
        with host.held() as held:
            assert held is not None and held.manifest.step == 3 and same_rows(held_rows(held), rows)
        assert host._plan is plan
