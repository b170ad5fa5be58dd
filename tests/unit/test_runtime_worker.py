"""A worker, without Ray: the process whose training thread can do no more."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path

import elastic
from elastic.runtime.worker import Assignment, Member
from tests.orders import local_order

training = elastic.TrainingOrder(
    num_steps=1, global_batch=2, virtual_ranks=2, seed=0, determinism="bitwise", grad_clip=None
)
order = local_order(
    Path(sys.argv[1]),
    elastic.JobOrder(path="nowhere:Job", settings={}, source="stdlib", code_dir=Path(sys.argv[1])),
    training=training,
    world=elastic.WorldPolicy(workers=1),
    every_steps=1,
    arena_mib=16,
)
member = Member(Assignment("w0", "h", "127.0.0.1", replace(order, lease_s=2.0)))
news = []
while not any(type(each).__name__ == "UserFailed" for each in news):
    news += member.poll(1.0).news
print("told", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
for _ in range(2):  # as it comes, and again to whoever greets it
    news = [type(each).__name__ for each in member.poll(20.0).news]
    print(*(name for name in news if name in ("MemberLeaving", "UserFailed")), flush=True)
    member.greet()
time.sleep(120)  # the lease ends this process long before
sys.exit(3)
"""


@pytest.mark.slow
def test_a_worker_whose_job_failed_tells_each_driver_of_its_notice_and_ends_with_its_lease(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert (ended.returncode, ended.stdout) == (
        0,
        "told\nMemberLeaving\nMemberLeaving UserFailed\n",
    ), ended.stderr[-2000:]


_FAILS = r"""
import os, re, signal, sys, time
from dataclasses import replace
from pathlib import Path

import elastic
from elastic.control.instructions import FormWorld, Manner
from elastic.runtime.lifeline import Lifelines
from elastic.runtime.mailbox import WorldOrder
from elastic.runtime.worker import Assignment, Member
from elastic.runtime.world import open_rendezvous
from tests.orders import local_order

training = elastic.TrainingOrder(
    num_steps=9, global_batch=8, virtual_ranks=4, seed=0, determinism="bitwise", grad_clip=None
)
order = local_order(
    Path(sys.argv[1]) / "run",
    elastic.JobOrder(
        path="tests.unit.test_training_failures:Failing", settings={}, source="none", code_dir=Path.cwd()
    ),
    training=training,
    world=elastic.WorldPolicy(workers=1),
    every_steps=100,
    arena_mib=16,
)
order.run_dir.mkdir()
member = Member(Assignment("w0", "h", "127.0.0.1", replace(order, lease_s=30.0)))
lifelines, (store, endpoint) = Lifelines("127.0.0.1", print), open_rendezvous("127.0.0.1")
news = []


def form(generation, only_saves):
    world = FormWorld(generation, ("w0",), ("h",), Manner.AT_ONCE, "a test", only_saves)
    member.form(WorldOrder(world, endpoint, lifelines.anchor))


def told(kind):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for each in member.poll(1.0).news:
            news.append(each)
        if found := [each for each in news if type(each).__name__ == kind]:
            return found[0]
    raise TimeoutError(f"no {kind} in {news}")


told("MemberReady")
form(1, only_saves=False)
failed = told("UserFailed")
print(failed.step, failed.message, "in batch" in failed.traceback)
form(2, only_saves=False)
while member._mailbox.has_newer():
    member.poll(0.1)
form(3, only_saves=True)
ended = told("MemberEnded")
print(ended.generation, ended.step, ended.ending)
form(3, only_saves=True)  # its driver has not heard that it came
news.extend(member.poll(10.0).news)
print(*(each.generation for each in news if type(each).__name__ == "MemberCame"))
print(*(each.step for each in news if type(each).__name__ == "CheckpointDurable"), flush=True)
os.kill(int(re.search(r"started keeper (\d+)", str(news)).group(1)), signal.SIGTERM)
member.die()
"""


@pytest.mark.slow
def test_a_worker_whose_job_failed_in_a_step_serves_no_world_but_one_that_saves_what_was_committed(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _FAILS, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.splitlines() == [
        "5 the job failed in step 5, virtual rank 2: SystemExit: 3 True",
        "3 5 stopped",
        "1 3 3",
        "5",
    ], ended.stderr[-2000:]
