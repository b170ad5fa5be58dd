"""What a silent process was doing, told from outside."""

import os
import signal
import subprocess
import sys

from elastic.runtime.autopsy import examine

STUCK = """
import sys, threading
from elastic.runtime.autopsy import prepare
def wait_for_ever():
    print("ready", flush=True)
    threading.Event().wait()
prepare()
wait_for_ever()
"""


def test_a_stuck_process_tells_its_stacks_and_a_stopped_one_its_state() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            assert "in wait_for_ever" in examine("w0", process.pid)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert "state T" in examine("w0", process.pid)
        finally:
            process.kill()


def test_a_process_that_is_gone_or_unprepared_is_told_as_that() -> None:
    assert "did not prepare" in examine("w0", os.getpid())
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert "gone" in examine("w1", process.pid)
