"""What can go wrong in elastic training, as one tree.

ElasticError
├── JobRejected      the job's path, shape or settings, or its data: a person has to mend it
├── ReplicasDiffer   copies of the state come out different again and again: a machine computes wrongly
├── TrainingFailed   the run ended without finishing; says why and what to do
├── Fenced           another driver owns this run now
└── RunGone          the run to resume has nothing to resume from
"""


class ElasticError(Exception):
    """Whatever the elastic trainer raises on purpose."""


class JobRejected(ElasticError):
    """The job cannot be trained as it is."""


class ReplicasDiffer(ElasticError):
    """Copies of the state differ each time they are computed, and nobody can tell which is right."""


class TrainingFailed(ElasticError):
    """The run ended without finishing."""


class Fenced(ElasticError):
    """A newer generation was claimed by another driver; this one must change nothing."""


class RunGone(ElasticError):
    """There is nothing to resume."""
