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
    print(*(name for name in news if name == "MemberLeaving"), flush=True)
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
    assert (ended.returncode, ended.stdout) == (0, "told\nMemberLeaving\nMemberLeaving\n"), ended.stderr[
        -2000:
    ]
