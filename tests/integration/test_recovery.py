"""Real SIGKILLs on real Ray: a worker, the driver, everything; the weights end the same bit for bit."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import elastic
from checkpoint import Catalog, open_store
from tests.integration.drivers import (
    Drive,
    await_no_keeper,
    await_step,
    drive_to_its_end,
    driving,
    finish,
    kill_group,
    kill_ray,
)
from tests.orders import local_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NUM_STEPS = 120
SETTINGS = {"num_layers": 2, "width": 64, "num_heads": 2, "sequence": 64}


def make_order(root: Path, name: str, *faults: elastic.Fault, workers: int = 3) -> elastic.TrainOrder:
    """A small run on a piece of the standard library's text."""
    order = local_order(
        root / name,
        elastic.JobOrder(
            path="elastic.training.gpt:GPTJob",
            settings=SETTINGS,
            source=str(Path(json.__file__).parent),
            code_dir=Path.cwd(),
        ),
        training=elastic.TrainingOrder(
            num_steps=NUM_STEPS,
            global_batch=24,
            virtual_ranks=6,
            seed=7,
            determinism="bitwise",
            grad_clip=1.0,
        ),
        world=elastic.WorldPolicy(workers=workers, min_workers=1),
        every_steps=10,
        arena_mib=64,
    )
    return replace(order, drill=faults)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> elastic.TrainReport:
    """The report of the run that nothing happened to."""
    return finish(make_order(tmp_path_factory.mktemp("runs"), "quiet"))


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    """Start drivers as processes in sessions of their own; what is left of them is killed in the end."""
    with driving(tmp_path) as start:
        yield start


def test_a_killed_worker_changes_no_bit_and_no_step_is_redone(
    quiet: elastic.TrainReport, tmp_path: Path
) -> None:
    report = finish(make_order(tmp_path, "killed", elastic.Fault(at_step=15, rank=1)))
    assert report.weights_sha256 == quiet.weights_sha256
    assert report.last_loss == quiet.last_loss
    (failure,) = report.failures
    assert failure.cause == "process died"
    assert failure.redone_steps == 0
    assert [span.size for span in report.worlds][:2] == [3, 2]
    survivors = {"w0", "w2"}
    pids = ready_pids(tmp_path / "killed")
    assert survivors <= pids.keys(), "survivors said hello once, so they kept their processes"


def test_no_reference_is_left_when_ray_shuts_down_for_whoever_drops_it_then_ends_the_driver(
    tmp_path: Path,
) -> None:
    order = make_order(tmp_path, "counted", elastic.Fault(at_step=5, rank=1), workers=2)
    order = replace(order, training=replace(order.training, num_steps=20))
    status, said = drive_to_its_end(order, "drive_counting")
    assert status == 0, said
    assert "references left: 0\n" in said, said


def ready_pids(run_dir: Path) -> dict[str, int]:
    """Which members introduced themselves, with their processes; a second process of a name fails."""
    pids: dict[str, int] = {}
    for moment in moments(run_dir):
        if moment["kind"] == "MemberReady":
            assert pids.setdefault(moment["member"], moment["pid"]) == moment["pid"]
    return pids


def moments(run_dir: Path) -> list[dict[str, Any]]:
    """Read a run's journal."""
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def test_a_world_that_ends_smaller_than_it_began_ends_with_the_same_bits(
    quiet: elastic.TrainReport, tmp_path: Path
) -> None:
    faults = (elastic.Fault(at_step=NUM_STEPS - 4, rank=2), elastic.Fault(at_step=NUM_STEPS - 2, rank=0))
    report = finish(make_order(tmp_path, "shrunk", *faults))
    assert report.weights_sha256 == quiet.weights_sha256
    assert report.worlds[-1].size < report.worlds[0].size
    assert report.redone_steps == 0


def test_a_killed_driver_is_succeeded_and_its_workers_go_on(
    quiet: elastic.TrainReport, tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "driverless")
    process = drive(order)
    await_step(order, 20, process)
    kill_group(process)
    before = ready_pids(order.run_dir)
    told = elastic.read_report(order.run_dir).committed_steps
    report = finish(order)
    assert report.weights_sha256 == quiet.weights_sha256
    assert report.segments == 2
    assert len(before) == 3 and ready_pids(order.run_dir) == before, "nobody was started anew"
    settled = [moment for moment in moments(order.run_dir) if moment["kind"] == "Settled"][3:]
    assert {moment["source"] for moment in settled} == {"self"}
    assert settled[0]["step"] > told, "they trained on while nobody drove"
    assert report.failures[0].cause == "driver lost"
    assert report.redone_steps == 0
    assert not any(psutil.pid_exists(pid) for pid in before.values()), "the workers ended with the run"


def test_after_everything_was_killed_a_resumed_run_ends_with_the_same_bits(
    quiet: elastic.TrainReport, tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "razed", elastic.Fault(at_step=12, rank=2))
    process = drive(order)
    await_step(order, 25, process)
    kill_group(process)
    kill_ray(order)
    newest = Catalog(open_store(order.checkpoint.store_url)).latest()
    assert newest is not None
    report = finish(order)
    assert report.weights_sha256 == quiet.weights_sha256
    drilled, razed = report.failures
    assert (drilled.cause, razed.cause) == ("process died", "driver lost"), "a drill is not repeated"
    assert razed.state_source == "store"
    assert report.status == "finished"


def test_a_signal_stops_after_a_final_checkpoint_and_a_later_call_goes_on(
    quiet: elastic.TrainReport, tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "stopped", workers=2)
    process = drive(order)
    await_step(order, 12, process)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    stopped = elastic.read_report(order.run_dir)
    assert stopped.status == "stopped"
    assert stopped.newest_durable_step == stopped.committed_steps < NUM_STEPS
    report = finish(order)
    assert report.weights_sha256 == quiet.weights_sha256
    assert report.redone_steps == 0


def test_a_stop_that_takes_too_long_leaves_the_last_checkpoint_to_the_workers_and_ends_none_of_them(
    tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "hasty", workers=2)
    order = replace(order, lease_s=5.0, training=replace(order.training, num_steps=1_000_000))
    order = replace(order, checkpoint=replace(order.checkpoint, every_steps=10_000))
    process = drive(order, "drive_hasty")
    await_step(order, 10, process, durable=None)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    stopped = elastic.read_report(order.run_dir)
    assert stopped.status == "stopped"
    workers = [psutil.Process(pid) for pid in ready_pids(order.run_dir).values() if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    newest = Catalog(open_store(order.checkpoint.store_url)).latest()
    assert newest is not None
    assert newest >= stopped.committed_steps
    await_no_keeper(order)


def test_without_a_driver_for_its_lease_a_run_saves_its_last_step_and_leaves_no_process(
    tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "orphaned", workers=2)
    order = replace(order, lease_s=5.0, training=replace(order.training, num_steps=1_000_000))
    order = replace(order, checkpoint=replace(order.checkpoint, every_steps=10_000))
    process = drive(order)
    await_step(order, 10, process, durable=None)
    kill_group(process)
    warden = int((order.run_dir / "ray" / "pid").read_text())
    orphans = [psutil.Process(pid) for pid in [warden, *ready_pids(order.run_dir).values()]]
    catalog = Catalog(open_store(order.checkpoint.store_url))
    _, alive = psutil.wait_procs(orphans, timeout=90)
    assert not alive
    newest = catalog.latest()
    assert newest is not None
    told = elastic.read_report(order.run_dir).committed_steps
    assert newest > told, "they trained on until the lease ran out, and saved the step they stopped at"


def test_when_a_worker_dies_without_a_driver_the_others_save_their_state_at_the_end_of_the_lease(
    tmp_path: Path, drive: Drive
) -> None:
    order = make_order(tmp_path, "bereft")
    order = replace(order, lease_s=5.0, training=replace(order.training, num_steps=1_000_000))
    order = replace(order, checkpoint=replace(order.checkpoint, every_steps=10_000))
    process = drive(order)
    await_step(order, 10, process, durable=None)
    kill_group(process)
    pids = ready_pids(order.run_dir)
    os.kill(pids["w0"], signal.SIGKILL)
    _, alive = psutil.wait_procs([psutil.Process(pids[name]) for name in ("w1", "w2")], timeout=60)
    assert not alive
    newest = Catalog(open_store(order.checkpoint.store_url)).latest()
    assert newest is not None
    assert newest >= elastic.read_report(order.run_dir).committed_steps


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("raise ZeroDivisionError('the job divides by zero')", "the job divides by zero"),
        ("torch.empty(1 << 50)", "take smaller micro-batches"),
    ],
)
def test_a_mistake_in_the_job_ends_the_run_with_one_clear_error(
    tmp_path: Path, statement: str, told: str
) -> None:
    (tmp_path / "faulty_job.py").write_text(
        "import torch\n\nfrom elastic.training.gpt import GPTJob\n\n\n"
        "class FaultyJob(GPTJob):\n"
        "    def loss(self, model, batch, rng):\n"
        f"        {statement}\n"
    )
    order = make_order(tmp_path, "faulty", workers=2)
    order = replace(order, job=replace(order.job, path="faulty_job:FaultyJob", code_dir=tmp_path))
    status, said = drive_to_its_end(order)
    assert status == 1
    (line,) = (line for line in said.splitlines() if line.startswith("elastic.errors.TrainingFailed: "))
    assert told in line
    assert elastic.read_report(order.run_dir).status == "failed"
    assert elastic.read_report(order.run_dir).failures == (), "a mistake in the job is no machine failure"
    await_no_keeper(order)


def test_an_optimizer_that_fails_halfway_on_all_workers_ends_the_run_once_at_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    (tmp_path / "halfway_job.py").write_text(
        "import torch\n\nfrom elastic.training.gpt import GPTJob\n\n\n"
        "class Halfway(torch.optim.SGD):\n"
        "    num_steps = 0\n\n"
        "    def step(self, closure=None):\n"
        "        self.num_steps += 1\n"
        "        super().step(closure)\n"
        "        if self.num_steps == 25:\n"
        "            raise RuntimeError('halfway')\n\n\n"
        "class HalfwayJob(GPTJob):\n"
        "    def optimizer(self, model):\n"
        "        return Halfway(model.parameters(), lr=0.01)\n"
    )
    order = make_order(tmp_path, "halfway", workers=2)
    order = replace(order, job=replace(order.job, path="halfway_job:HalfwayJob", code_dir=tmp_path))
    status, said = drive_to_its_end(order)
    assert status == 1
    (line,) = (line for line in said.splitlines() if line.startswith("elastic.errors.TrainingFailed: "))
    assert line.endswith("the job failed at step 24: RuntimeError: halfway")
    report = elastic.read_report(order.run_dir)
    assert (report.status, report.newest_durable_step) == ("failed", 20)
    assert [failure.cause for failure in report.failures] == ["world broken"]
    assert sum(moment["kind"] == "FormWorld" for moment in moments(order.run_dir)) == 2, "one to save"


def test_a_fault_of_hardware_that_the_job_meets_costs_its_worker_and_changes_no_bit(
    quiet: elastic.TrainReport, tmp_path: Path
) -> None:
    (tmp_path / "unlucky_job.py").write_text(
        "from pathlib import Path\n\nfrom elastic.training.gpt import GPTJob\n\n\n"
        "class UnluckyJob(GPTJob):\n"
        "    def batch(self, dataset, step, virtual_rank):\n"
        f"        met = Path({str(tmp_path / 'met')!r})\n"
        "        if (step, virtual_rank) == (15, 2) and not met.exists():\n"
        "            met.touch()\n"
        "            raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\n"
        "        return super().batch(dataset, step, virtual_rank)\n"
    )
    order = make_order(tmp_path, "unlucky", workers=2)
    order = replace(order, job=replace(order.job, path="unlucky_job:UnluckyJob", code_dir=tmp_path))
    report = finish(order)
    (failure,) = report.failures
    assert (failure.cause, failure.redone_steps) == ("worker failed", 0)
    assert report.weights_sha256 == quiet.weights_sha256
