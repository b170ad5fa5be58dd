"""Verbs that convert checkpoints: into another layout, from another framework's format, and into one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_checkpoints import (
    FORMATS,
    AsJson,
    Format,
    Rules,
    RunsDir,
    Sizes,
    Step,
    Where,
    format_names,
    known_format,
    rule_names,
)
from flows.console import clear_errors, followed, resumable, screen
from tasks.heap import share_heap

if TYPE_CHECKING:
    import checkpoint

app = typer.Typer(rich_markup_mode="rich")

_GO_ON = "What is finished is kept: the same command goes on from there."

Target = Annotated[str, typer.Argument(metavar="DST", help="A store's URL or directory.")]
Budget = Annotated[str, typer.Option("--memory-budget", help="The most memory that buffers take.")]
Threads = Annotated[int, typer.Option(min=1, help="How many threads read, encode and write.")]
ByOrder = Annotated[
    bool,
    typer.Option(
        "--by-order", help="An optimizer without names numbers its parameters in the model's order."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be read and written.")]
Only = Annotated[
    str | None,
    typer.Option(
        metavar="GLOB", help="Only tensors and values of such names, like 'model/*'.", show_default=False
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Cast the model's floats: bf16, fp16, fp32, fp64. Optimizer states stay as they are."),
]
AllowOverflow = Annotated[
    bool,
    typer.Option("--allow-overflow", help="Casts may make numbers infinite that the new type does not have."),
]
Layout = Annotated[
    str, typer.Option(metavar="LAYOUT", help="Axes and their ranks, such as replica=2,shard=4,tensor=2.")
]


@app.command()
def reshard(
    source: Where,
    target: Target,
    to: Layout = "replica=1",
    rules: Rules = None,
    sizes: Sizes = None,
    dtype: Dtype = None,
    only: Only = None,
    step: Step = None,
    allow_overflow: AllowOverflow = False,
    budget: Budget = "1GiB",
    threads: Threads = 2,
    dry_run: DryRun = False,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint anew, cut for another layout; each tensor is proved before it counts.

    A layout names axes, outermost first: replica, shard, tensor, pipeline, expert, context; zero=1|2|3
    divides over the replicas. How tensor, pipeline and expert ranks divide a model, names tell, or rules.
    Restoring needs none of this: a Checkpointer reads any layout into its own.
    """
    with clear_errors(), resumable(_GO_ON):
        import checkpoint
        from flows import conversions, stores

        change = checkpoint.Change(
            conversions.layout_of(to),
            conversions.dtype_of(dtype),
            only,
            conversions.rules_of(conversions.Rules(rules, sizes or ())),
        )
        settings = _settings(budget, threads, allow_overflow)
        old, new = (
            checkpoint.open_store(stores.find(source, Path(runs_dir))),
            checkpoint.open_store(target),
        )
        if dry_run:
            report = checkpoint.plan_reshard(old, new, change, step=step, settings=settings)
        else:
            with followed() as listener:
                report = checkpoint.reshard(old, new, change, step=step, settings=settings, listener=listener)
        _tell(report, as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A foreign checkpoint's URL or directory.")],
    target: Target,
    format: Format = None,
    rules: Rules = None,
    sizes: Sizes = None,
    to: Layout = "replica=1",
    only: Only = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Its step. Default: what it says itself, or 0.", show_default=False),
    ] = None,
    tie: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OTHER=NAME", help="A weight's other name: lm_head.weight=wte.weight. Repeatable."
        ),
    ] = None,
    by_order: ByOrder = False,
    run: Annotated[str, typer.Option(help="The name of its run; 'run' is a Checkpointer's default.")] = "run",
    allow_overflow: AllowOverflow = False,
    budget: Budget = "1GiB",
    threads: Threads = 2,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take over another framework's checkpoint, so that a Checkpointer restores it like its own.

    Tensors keep their names, as model/NAME and optimizer/state/NAME/STATE, unless rules say otherwise; a
    checkpoint that is spread over tensor or pipeline ranks needs rules; a tied weight that its files do not
    tell of, by --tie; the order of an optimizer without names, by --by-order; a part of it, by --only.
    Nothing of it is ever executed.
    """
    with clear_errors(), resumable(_GO_ON):
        import checkpoint
        from flows import conversions

        chosen = conversions.rules_of(conversions.Rules(rules, sizes or ()))
        ties = conversions.ties_of(tie or ())
        numbering = checkpoint.Numbering.BY_ORDER if by_order else checkpoint.Numbering.TOLD
        adoption = checkpoint.Adoption(run, step, chosen, conversions.layout_of(to), ties, numbering, only)
        settings = _settings(budget, threads, allow_overflow)
        store = checkpoint.open_store(target)
        if dry_run:
            report = checkpoint.plan_import_foreign(source, store, adoption, format=format, settings=settings)
        else:
            with followed() as listener:
                report = checkpoint.import_foreign(
                    source, store, adoption, format=format, settings=settings, listener=listener
                )
        _tell(report, as_json)


@app.command()
def export(
    source: Where,
    target: Annotated[str, typer.Argument(metavar="DST", help="A new directory, here or behind a URL.")],
    format: Annotated[
        str,
        typer.Option(help=f"{', '.join(FORMATS)}.", autocompletion=format_names, callback=known_format),
    ],
    source_format: Annotated[
        str | None,
        typer.Option(
            help="The source is a foreign checkpoint of this format, and no store of ours.",
            autocompletion=format_names,
            callback=known_format,
        ),
    ] = None,
    source_rules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Rules that read a foreign source.", autocompletion=rule_names
        ),
    ] = None,
    source_sizes: Annotated[
        list[str] | None,
        typer.Option("--source-set", metavar="size=N", help="A size for --source-rules. Repeatable."),
    ] = None,
    rules: Rules = None,
    sizes: Sizes = None,
    by_order: ByOrder = False,
    to: Layout = "replica=1",
    dtype: Dtype = None,
    only: Only = None,
    step: Step = None,
    allow_overflow: AllowOverflow = False,
    budget: Budget = "1GiB",
    threads: Threads = 2,
    dry_run: DryRun = False,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in another framework's format, and prove it by reading it back.

    Rules turn its tensors into what the framework calls them and how it cuts them; --to says over how many
    tensor, pipeline and expert ranks, or at which stage of ZeRO (replica=4,zero=3). A foreign source goes
    straight into the other format.
    """
    with clear_errors(), resumable(_GO_ON):
        import checkpoint
        from flows import conversions, stores

        chosen = conversions.rules_of(conversions.Rules(rules, sizes or ()))
        emigration = checkpoint.Emigration(
            format, conversions.layout_of(to), chosen, conversions.dtype_of(dtype), only
        )
        settings = _settings(budget, threads, allow_overflow)
        named = conversions.Rules(source_rules, source_sizes or (), "--source-")
        place = checkpoint.Whereabouts(
            stores.find(source, Path(runs_dir)),
            step,
            source_format,
            conversions.rules_of(named),
            checkpoint.Numbering.BY_ORDER if by_order else checkpoint.Numbering.TOLD,
        )
        if dry_run:
            with followed() as listener:
                report = checkpoint.plan_export_foreign(
                    place, target, emigration, settings=settings, listener=listener
                )
        else:
            with followed() as listener:
                report = checkpoint.export_foreign(
                    place, target, emigration, settings=settings, listener=listener
                )
        _tell(report, as_json)


def _settings(budget: str, threads: int, allow_overflow: bool) -> "checkpoint.ConversionSettings":
    import checkpoint
    from flows import conversions

    share_heap()  # what the allocator keeps for threads that are gone would come on top of the budget
    overflow = checkpoint.Overflow.ALLOWED if allow_overflow else checkpoint.Overflow.REFUSED
    return conversions.settings_of(budget, threads, overflow)


def _tell(report: object, as_json: bool) -> None:
    from flows import conversions

    if as_json:
        print(json.dumps(conversions.describe_report(report), indent=2))  # type: ignore[arg-type]  # lazily typed
    else:
        conversions.draw_report(screen, report)  # type: ignore[arg-type]  # lazily typed
