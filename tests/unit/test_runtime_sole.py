"""The run's lock: one driver on a machine, and nothing that a dead one has forked stands in for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic.errors import Fenced
from elastic.runtime.sole import sole_driver
from tests.orders import unasked_order

_DRIVER = """
import os, signal, sys, time
from pathlib import Path
from elastic.runtime.sole import sole_driver
from tests.orders import unasked_order

with sole_driver(unasked_order(Path(sys.argv[1]))):
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        time.sleep(100)  # until it is killed
    os.wait()
"""


def test_a_second_driver_on_this_machine_is_refused_until_the_first_is_done(tmp_path):
    order = unasked_order(tmp_path)
    with sole_driver(order), pytest.raises(Fenced, match="already driving run"), sole_driver(order):
        pass
    with sole_driver(order):
        pass


def test_what_a_dead_driver_has_forked_does_not_keep_its_successor_out(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _DRIVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        try:
            with pytest.raises(Fenced), sole_driver(unasked_order(tmp_path)):
                pass
            driver.kill()
            driver.wait(timeout=20)
            os.kill(child, 0)
            with sole_driver(unasked_order(tmp_path)):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
