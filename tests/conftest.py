"""What every test stands on: Hypothesis profiles, an environment of its own, and no process left behind."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import stamina
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.contract.suite", "tests.contract.s3_suite")  # others inherit them
REPOSITORY = Path(__file__).resolve().parent.parent
_MARK = "HOLDFAST_TEST_SESSION"

settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dev")

_ended = pytest.StashKey[list[str]]()
_home = pytest.StashKey[Path]()


@pytest.fixture
def quiet_retries() -> Iterator[None]:
    """Keep requests that are tried again from being logged one by one."""
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(None)


def pytest_configure(config: pytest.Config) -> None:
    """Give the session its own Prefect home, nobody's server or cluster, and a mark on its children."""
    home = Path(tempfile.mkdtemp(prefix="hf-tests-"))
    config.stash[_home] = home
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.environ.update(
        {
            _MARK: home.name,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MPLBACKEND": "agg",
        }
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what the tests started and left: by process id, known by the mark in its environment."""
    config = session.config
    ended = config.stash.setdefault(_ended, [])
    for pid, command in _marked_processes(os.environ[_MARK]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        ended.append(f"{pid}: {command}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the processes that had to be ended."""
    ended = config.stash.get(_ended, [])
    if ended:
        terminalreporter.section("processes the tests left behind (ended)")
        for line in ended:
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's Prefect home."""
    shutil.rmtree(config.stash[_home], ignore_errors=True)


def _marked_processes(mark: str) -> Iterator[tuple[int, str]]:
    """Yield (pid, command line) of every other process that was started with this session's environment."""
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "multiprocessing.resource_tracker" not in command:  # this process's own, ends with it
                    yield int(entry.name), command[:120]
        except OSError:
            continue  # it has just ended, or belongs to somebody else


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the browser's executable; without one the test says what to install and does not run."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium on this machine: install the packages of deploy/apt.txt")
