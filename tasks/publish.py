"""Write a run's weights as a Hugging Face style directory, and prove that they give the evaluated loss."""

import json
import os
import shutil
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import TypeAdapter
from safetensors.torch import load_model, save_model

import checkpoint
import elastic
from tasks.errors import Unverified
from tasks.evaluate import score
from tasks.findings import Scored
from tasks.jobs import Opened, open_job
from tasks.runs import Run
from tasks.telling import say

WEIGHTS = "model.safetensors"

_CARD = """---
library_name: holdfast
---

# {run}

Weights of the job `{job}` after {step} steps on `{source}` (seed {seed}), trained elastically with Holdfast.

| | |
|---|---|
| validation loss | {loss:.6f} nats over {num_tokens} tokens |
| entropy of the data's single bytes | {unigram} |
| parameters | {num_parameters:,} |
| sha256 of the weights | `{sha256}` |

`model.safetensors` holds the weights, `config.json` the job and its settings. To load them:

```python
import json
from pathlib import Path

import elastic
from safetensors.torch import load_model

config = json.loads(Path("config.json").read_text())
model = elastic.build_model(config["job"], config["settings"])
load_model(model, "model.safetensors")
```
"""


@task(
    name="publish",
    task_run_name="publish {run.name}",
    retries=1,
    retry_delay_seconds=5,
    timeout_seconds=7200,
    cache_policy=NO_CACHE,
)
def publish(run: Run, scored: Scored) -> Path:
    """Publish the scored checkpoint's weights, in the place of any published before. Raises Unverified."""
    job = open_job(run.spec)
    state = checkpoint.load(checkpoint.open_store(run.store_url), scored.step).state
    model = elastic.model_from_state(run.spec.job.path, run.spec.job.settings, state)
    draft = run.published_path.with_name(f".published.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_model(model, str(draft / WEIGHTS), metadata={"format": "pt"})
    sha256 = elastic.weights_sha256(model)
    config = _config(run, job, scored, sha256)
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (draft / "README.md").write_text(
        _card(run, scored, sha256, sum(each.numel() for each in model.parameters()))
    )
    _prove(run, job, scored, draft / WEIGHTS)
    _replace(run.published_path, draft)
    say("publish", f"published to {run.published_path}; read back, it gives the evaluated loss exactly")
    return run.published_path


def _prove(run: Run, job: Opened, scored: Scored, weights: Path) -> None:
    """Load the file into a fresh model and evaluate it: the loss must be the same, to the last bit."""
    fresh = job.job.model(job.settings)
    load_model(fresh, str(weights))
    again = score(run, scored.step, {"model": fresh.state_dict()})
    if repr(again.loss) != repr(scored.loss):
        raise Unverified(
            f"{weights} gives the loss {again.loss!r}, but {scored.loss!r} was evaluated; "
            "nothing was published. "
            "Does the job's model hold state that is not in its state_dict?"
        )


def _config(run: Run, job: Opened, scored: Scored, sha256: str) -> dict[str, object]:
    """Say what a reader needs to build the model again."""
    describe = getattr(job.job, "describe", None)
    described: dict[str, object] = {} if describe is None else describe(job.settings)
    return {
        "model_type": "holdfast-job",
        "architectures": [run.spec.job.path.rpartition(":")[2]],
        "job": run.spec.job.path,
        "settings": TypeAdapter(job.job.settings).dump_python(job.settings, mode="json"),
        "run": run.name,
        "step": scored.step,
        "weights_sha256": sha256,
        **described,
    }


def _card(run: Run, scored: Scored, sha256: str, num_parameters: int) -> str:
    return _CARD.format(
        run=run.name,
        job=run.spec.job.path,
        step=scored.step,
        source=run.spec.data.source,
        seed=run.spec.training.seed,
        loss=scored.loss,
        num_tokens=scored.num_tokens,
        unigram="unknown" if scored.unigram is None else f"{scored.unigram:.6f} nats",
        num_parameters=num_parameters,
        sha256=sha256,
    )


def _replace(published: Path, draft: Path) -> None:
    """Put the draft in the place of what was published before."""
    old = published.with_name(f".published.{os.getpid()}.old")
    if published.exists():
        published.rename(old)
    draft.rename(published)
    shutil.rmtree(old, ignore_errors=True)
