"""The elastic trainer's face: order a run, watch it, read its report, evaluate its checkpoints."""

from elastic.control.course import FailureSpan
from elastic.control.policy import WorldPolicy
from elastic.control.report import CheckpointCount, TrainReport, WorldSpan
from elastic.control.standbys import num_standbys
from elastic.errors import ElasticError, Fenced, JobRejected, RunGone, TrainingFailed
from elastic.runtime.driver import train
from elastic.runtime.journal import read_report
from elastic.runtime.notices import Happening, LogLine, Notice, Observer, Progress
from elastic.runtime.order import (
    CheckpointOrder,
    ClusterOrder,
    Fault,
    FaultKind,
    JobOrder,
    TrainingOrder,
    TrainOrder,
)
from elastic.runtime.wish import resize
from elastic.training.evaluation import Evaluation, build_model, evaluate, model_from_state
from elastic.training.job import Job, Split, load_job, load_settings
from elastic.training.randomness import seed_for
from elastic.training.state import weights_sha256

__all__ = [
    "CheckpointCount",
    "CheckpointOrder",
    "ClusterOrder",
    "ElasticError",
    "Evaluation",
    "FailureSpan",
    "Fault",
    "FaultKind",
    "Fenced",
    "Happening",
    "Job",
    "JobOrder",
    "JobRejected",
    "LogLine",
    "Notice",
    "Observer",
    "Progress",
    "RunGone",
    "Split",
    "TrainOrder",
    "TrainReport",
    "TrainingFailed",
    "TrainingOrder",
    "WorldPolicy",
    "WorldSpan",
    "build_model",
    "evaluate",
    "load_job",
    "load_settings",
    "model_from_state",
    "num_standbys",
    "read_report",
    "resize",
    "seed_for",
    "train",
    "weights_sha256",
]
