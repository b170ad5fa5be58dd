"""Convert a checkpoint: into another layout or type, from a foreign format, or into one."""

from typing import Any, ClassVar

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import BaseModel, ConfigDict, Field

import checkpoint
from tasks.telling import say

_ARTIFACT = "conversion"


class ConversionOrder(BaseModel):
    """What is to be converted into what. It is also the form in Prefect's UI."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="URL or directory of a store, or of a foreign checkpoint.")
    target: str = Field(description="URL or directory of a store, or of a new foreign checkpoint.")
    source_format: str | None = Field(
        None,
        description="hf, dcp, torch, megatron, deepspeed or deepspeed-universal. Nothing: a store of ours.",
    )
    target_format: str | None = Field(
        None,
        description="hf, dcp, torch, megatron, deepspeed or deepspeed-universal. Nothing: a store of ours.",
    )
    step: int | None = Field(None, ge=0, description="Which checkpoint. Nothing: the newest.")
    to: str = Field("replica=1", description="The layout, such as replica=2,shard=4,tensor=2.")
    dtype: str | None = Field(None, description="Cast the model's floats: bf16, fp16, fp32, fp64.")
    only: str | None = Field(None, description="A glob of names, such as model/*.")
    rules: str | None = Field(None, description="Rules of the model: a built-in set, or a YAML file.")
    sizes: list[str] = Field(default_factory=list, description="The model's sizes for the rules: layers=12.")
    ties: list[str] = Field(
        default_factory=list,
        description="Other names of tied weights, in an import: lm_head.weight=wte.weight.",
    )
    by_order: bool = Field(
        False, description="An optimizer without names numbers its parameters in the model's order."
    )
    memory_budget_mib: int = Field(1024, ge=128, description="The most memory that buffers take.")
    threads: int = Field(2, ge=1, description="How many threads read and encode.")


def may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a conversion failed for what may be over soon; a mistake in an order stays one."""
    return isinstance(state.result(raise_on_failure=False), checkpoint.StoreUnavailable)


@task(
    name="convert",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=may_pass,
    timeout_seconds=86_400,
    cache_policy=NO_CACHE,
)
def convert(order: ConversionOrder) -> checkpoint.ConversionReport:
    """Convert a checkpoint, and prove each tensor of it. A retry goes on from what was finished."""
    report = carry_out(order)
    say("conversion", f"step {report.step}: {report.num_tensors} tensors, each of them proved")
    return report


@task(name="report conversion", timeout_seconds=300, cache_policy=NO_CACHE)
def report_conversion(report: checkpoint.ConversionReport) -> None:
    """Show what was converted, and how each tensor was proved."""
    rows = [
        {"tensor": one.name, "proof": one.how, "fingerprint": f"{one.fingerprint:016x}"}
        for one in report.proofs
    ]
    told = (
        f"Step {report.step} of {report.source} -> {report.target} ({report.layout}): "
        f"{report.num_bytes} bytes of {report.num_tensors} tensors in {report.seconds:.1f} s; "
        f"read {report.read_bytes}, written {report.written_bytes}. {' '.join(report.notes)}"
    )
    create_table_artifact(table=rows, key=_ARTIFACT, description=told)


def carry_out(order: ConversionOrder) -> checkpoint.ConversionReport:
    """Do what is ordered. Raises FormatError for what needs two conversions, and as they do."""
    settings = checkpoint.ConversionSettings(order.memory_budget_mib << 20, order.threads)
    numbering = checkpoint.Numbering.BY_ORDER if order.by_order else checkpoint.Numbering.TOLD
    rules = None if order.rules is None else checkpoint.choose_rules(order.rules, order.sizes)
    if order.target_format is not None:
        emigration = checkpoint.Emigration(order.target_format, order.to, rules, order.dtype, order.only)
        place = checkpoint.Whereabouts(order.source, order.step, order.source_format, numbering=numbering)
        return checkpoint.export_foreign(place, order.target, emigration, settings=settings)
    if order.source_format is not None:
        if order.dtype is not None or order.only is not None:
            raise checkpoint.FormatError("import it into a store first; from there it is cast and divided")
        ties = checkpoint.parse_ties(order.ties)
        adoption = checkpoint.Adoption(
            step=order.step, rules=rules, to=order.to, ties=ties, numbering=numbering
        )
        target = checkpoint.open_store(order.target)
        return checkpoint.import_foreign(
            order.source, target, adoption, format=order.source_format, settings=settings
        )
    source = checkpoint.open_store(order.source)
    change = checkpoint.Change(order.to, order.dtype, order.only, rules)
    target = checkpoint.open_store(order.target)
    return checkpoint.reshard(source, target, change, step=order.step, settings=settings)
