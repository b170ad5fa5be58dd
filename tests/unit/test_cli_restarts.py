"""Automatic restarts are counted once per crash, and bounded."""

import pytest

from tasks.errors import TooManyRestarts
from tasks.loading import load_spec
from tasks.provision import _count_restart
from tasks.runs import Run


@pytest.fixture
def run(tmp_path):
    return Run("crashing", tmp_path, load_spec(None, ["recovery.max_restarts=2"]))


def test_a_crash_that_is_told_twice_is_answered_once(run):
    assert _count_restart(run, "first")
    assert not _count_restart(run, "first")
    assert len(run.restarts_path.read_text().splitlines()) == 1


def test_one_crash_too_many_is_refused_and_not_counted(run):
    assert _count_restart(run, "first")
    assert _count_restart(run, "second")
    with pytest.raises(TooManyRestarts, match=r"recovery\.max_restarts = 2"):
        _count_restart(run, "third")
    assert len(run.restarts_path.read_text().splitlines()) == 2
