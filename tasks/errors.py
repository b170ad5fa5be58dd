"""What can go wrong between a person and a run, as one tree; a person has to mend each.

TaskError
├── SpecError      the specification is wrong: names the key, and what it may be
├── RunExists      a new run was asked for under a taken name
├── NoSuchRun      there is no run of that name
├── Unusable       the job, the data or the store cannot serve this run
├── Unverified     a checkpoint or a publication is not what it should be
├── TooManyRestarts  the run crashed more often than its specification allows
└── ServerSilent   the Prefect server did not come up
"""


class TaskError(Exception):
    """Whatever tasks and flows raise on purpose."""


class SpecError(TaskError):
    """The specification cannot be used; one line per mistake."""


class RunExists(TaskError):
    """A run of this name exists; nothing of it was touched."""


class NoSuchRun(TaskError):
    """There is no run of this name."""


class Unusable(TaskError):
    """The job, the data or the store cannot serve the run."""


class Unverified(TaskError):
    """What was read back is not what was trained."""


class TooManyRestarts(TaskError):
    """The run has crashed and been restarted as often as its specification allows."""


class ServerSilent(TaskError):
    """The Prefect server does not answer."""
