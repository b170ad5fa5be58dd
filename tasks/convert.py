"""Convert a checkpoint: into another layout or type, from a foreign format, or into one."""

from typing import Any, ClassVar

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import BaseModel, ConfigDict, Field

import checkpoint
from tasks.heap import share_heap
from tasks.telling import say

_ARTIFACT = "conversion"


class ConversionOrder(BaseModel):
    """What is to be converted into what. It is also the form in Prefect's UI."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="URL or directory of a store, or of a foreign checkpoint.")
    target: str = Field(description="URL or directory of a store, or of a new foreign checkpoint.")
    source_format: str | None = Field(
        None, description=f"{', '.join(checkpoint.format_names())}. Nothing: what it looks like."
    )
    target_format: str | None = Field(
        None, description=f"{', '.join(checkpoint.format_names())}. Nothing: a store of ours."
    )
    step: int | None = Field(None, ge=0, description="Which checkpoint. Nothing: the newest.")
    to: str = Field("replica=1", description="The layout, such as replica=2,shard=4,tensor=2.")
    dtype: str | None = Field(None, description="Cast the model's floats: bf16, fp16, fp32, fp64.")
    only: str | None = Field(None, description="A glob of names, such as model/*.")
    rules: str | None = Field(None, description="Rules of the model: a built-in set, or a YAML file.")
    sizes: list[str] = Field(default_factory=list, description="The model's sizes for the rules: layers=12.")
    source_rules: str | None = Field(
        None, description="Rules that read a foreign source which goes into another format."
    )
    source_sizes: list[str] = Field(default_factory=list, description="Sizes for the source's rules.")
    run: str = Field("run", description="The name of an imported run; 'run' is a Checkpointer's default.")
    ties: list[str] = Field(
        default_factory=list,
        description="Other names of tied weights, in an import: lm_head.weight=wte.weight.",
    )
    by_order: bool = Field(
        False, description="An optimizer without names numbers its parameters in the model's order."
    )
    allow_overflow: bool = Field(
        False, description="Casts may make numbers infinite that the new type does not have."
    )
    dry_run: bool = Field(False, description="Only tell what would be read and written.")
    memory_budget_mib: int = Field(1024, ge=128, description="The most memory that buffers take.")
    threads: int = Field(2, ge=1, description="How many threads read and encode.")


def may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a conversion failed for what may be over soon; a mistake in an order stays one."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, checkpoint.StoreUnavailable) and not isinstance(
        failure, checkpoint.StoreRefused
    )


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
    share_heap()
    report = carry_out(order)
    did = "would be converted" if report.is_dry and report.is_new else "each of them proved"
    say("conversion", f"step {report.step}: {report.num_tensors} tensors, {did}")
    return report


@task(name="report conversion", timeout_seconds=300, cache_policy=NO_CACHE)
def report_conversion(report: checkpoint.ConversionReport) -> None:
    """Show what was converted, and how each tensor was proved."""
    rows = [
        {"tensor": one.name, "proof": one.how, "fingerprint": f"{one.fingerprint:016x}"}
        for one in report.proofs
    ]
    create_table_artifact(table=rows, key=_ARTIFACT, description=describe(report))


def describe(report: checkpoint.ConversionReport) -> str:
    """Say in a few lines what a conversion did, or that it was only rehearsed."""
    size = f"{report.num_bytes} bytes of {report.num_tensors} tensors"
    if not report.is_new:
        did = f"{size} were there already, and are proved; read {report.read_bytes}, written 0"
    elif report.is_dry:
        most = "" if report.is_exact else "at most "
        did = (
            f"{size} would be converted; {report.read_bytes} would be read and {most}{report.written_bytes} "
            "written. This was a dry run: nothing was written or proved"
        )
    else:
        did = f"{size} in {report.seconds:.1f} s; read {report.read_bytes}, written {report.written_bytes}"
    where = f"Step {report.step} of {report.source} -> {report.target} ({report.layout})"
    return f"{where}: {did}. {' '.join(report.notes)}"


def carry_out(order: ConversionOrder) -> checkpoint.ConversionReport:
    """Do what is ordered, or tell what it would do. Raises FormatError for what needs two conversions."""
    if order.target_format is not None:
        return _export(order)
    if order.source_format is not None or not checkpoint.is_store(order.source):
        return _import(order)
    return _reshard(order)


def _reshard(order: ConversionOrder) -> checkpoint.ConversionReport:
    _refuse(order, "a resharding", ("source_rules", "source_sizes", "run", "ties", "by_order"))
    source, target = checkpoint.open_store(order.source), checkpoint.open_store(order.target)
    change = checkpoint.Change(order.to, order.dtype, order.only, _rules(order.rules, order.sizes))
    act = checkpoint.plan_reshard if order.dry_run else checkpoint.reshard
    return act(source, target, change, step=order.step, settings=_settings(order))


def _import(order: ConversionOrder) -> checkpoint.ConversionReport:
    then = "; for a dtype, import it into a store first, and convert that"
    _refuse(order, "an import", ("dtype", "source_rules", "source_sizes"), then)
    adoption = checkpoint.Adoption(
        run=order.run,
        step=order.step,
        rules=_rules(order.rules, order.sizes),
        to=order.to,
        ties=checkpoint.parse_ties(order.ties),
        numbering=_numbering(order),
        only=order.only,
    )
    target = checkpoint.open_store(order.target)
    act = checkpoint.plan_import_foreign if order.dry_run else checkpoint.import_foreign
    return act(order.source, target, adoption, format=order.source_format, settings=_settings(order))


def _export(order: ConversionOrder) -> checkpoint.ConversionReport:
    _refuse(order, "an export", ("run", "ties"))
    rules = _rules(order.rules, order.sizes)
    emigration = checkpoint.Emigration(order.target_format or "", order.to, rules, order.dtype, order.only)
    source = checkpoint.Whereabouts(
        order.source,
        order.step,
        order.source_format,
        _rules(order.source_rules, order.source_sizes),
        _numbering(order),
    )
    act = checkpoint.plan_export_foreign if order.dry_run else checkpoint.export_foreign
    return act(source, order.target, emigration, settings=_settings(order))


def _refuse(order: ConversionOrder, what: str, names: tuple[str, ...], then: str = "") -> None:
    """Refuse fields that a direction would pass over in silence. Raises FormatError naming them."""
    fields = ConversionOrder.model_fields
    given = [
        name for name in names if getattr(order, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        raise checkpoint.FormatError(f"{what} has no use for {', '.join(given)}: leave them empty{then}")


def _rules(name: str | None, sizes: list[str]) -> checkpoint.RuleChoice | None:
    if name is None and sizes:
        raise checkpoint.FormatError(f"the sizes {sizes} are for rules: name these")
    return None if name is None else checkpoint.choose_rules(name, sizes)


def _numbering(order: ConversionOrder) -> checkpoint.Numbering:
    return checkpoint.Numbering.BY_ORDER if order.by_order else checkpoint.Numbering.TOLD


def _settings(order: ConversionOrder) -> checkpoint.ConversionSettings:
    overflow = checkpoint.Overflow.ALLOWED if order.allow_overflow else checkpoint.Overflow.REFUSED
    return checkpoint.ConversionSettings(order.memory_budget_mib << 20, order.threads, overflow=overflow)
