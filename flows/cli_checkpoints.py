"""Verbs that look at, keep and compare checkpoints. They need neither Prefect nor Ray."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.console import EXIT_FAILED, clear_errors, followed, mode, resumable, screen

app = typer.Typer(rich_markup_mode="rich")

Where = Annotated[
    str, typer.Argument(metavar="URL|RUN", help="A store's URL or directory, or the name of a run.")
]
RunsDir = Annotated[str, typer.Option(help="Where runs have their directories.")]
# Spelled out, as the help is shown without the imports that opening a checkpoint takes; a test compares.
FORMATS = ("hf", "dcp", "torch", "megatron", "megatron-dist", "deepspeed", "deepspeed-universal")


def _note_json(is_json: bool) -> bool:
    mode.is_json = is_json
    return is_json


AsJson = Annotated[
    bool,
    typer.Option("--json", help="JSON instead of tables, errors too.", is_eager=True, callback=_note_json),
]


def format_names() -> list[str]:
    """List the formats for a shell that completes."""
    return list(FORMATS)


def known_format(name: str | None) -> str | None:
    """Return the name of a format, if it is one."""
    if name is not None and name not in FORMATS:
        raise typer.BadParameter(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    return name


def rule_names() -> list[str]:
    """List the built-in rule sets for a shell that completes."""
    import checkpoint

    return checkpoint.rule_names()


Format = Annotated[
    str | None,
    typer.Option(
        help=f"Foreign: {', '.join(FORMATS)}. Default: what it looks like.",
        autocompletion=format_names,
        callback=known_format,
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Rules of the model: a built-in set, or a YAML file.",
        autocompletion=rule_names,
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="size=N", help="A size of the model, for the rules: layers=12. Repeatable."
    ),
]
Step = Annotated[
    int | None, typer.Option(min=0, help="The checkpoint's step. Default: the newest.", show_default=False)
]


@app.command()
def inspect(
    where: Where,
    step: Annotated[
        int | None, typer.Option(min=0, help="Show what this checkpoint holds.", show_default=False)
    ] = None,
    format: Format = None,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a store, and what the newest (or one of your choice) holds.

    Works on foreign checkpoints as well: safetensors, torch, DCP, DeepSpeed, Megatron.
    """
    from flows import stores

    with clear_errors():
        url = stores.find(where, Path(runs_dir))
        found = stores.look_anywhere(url, step, format)
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            stores.draw_store(screen, found)
        if any(each["trouble"] for each in found["checkpoints"]):
            raise typer.Exit(EXIT_FAILED)


@app.command()
def verify(
    where: Where,
    step: Annotated[int | None, typer.Option(min=0, help="Only this checkpoint.", show_default=False)] = None,
    since_days: Annotated[
        float | None, typer.Option(min=0, help="Skip what was proved in so many days.", show_default=False)
    ] = None,
    budget_mib: Annotated[
        int | None, typer.Option(min=1, help="Stop after about so many MiB.", show_default=False)
    ] = None,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Read checkpoints back, every chunk: checksums, fingerprints, coverage. Exits with 1 on damage."""
    from flows import stores

    since_s = None if since_days is None else max(0.0, time.time() - since_days * 86_400)
    budget_bytes = None if budget_mib is None else budget_mib << 20
    with clear_errors():
        url = stores.find(where, Path(runs_dir))
        with followed() as listener:
            results = stores.verify(url, step, since_s=since_s, budget_bytes=budget_bytes, listener=listener)
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            stores.draw_verification(screen, results)
        if any(each["whole"] is False for each in results):
            raise typer.Exit(EXIT_FAILED)


@app.command()
def prune(
    where: Where,
    keep: Annotated[
        list[str],
        typer.Option(
            help="Keep by a policy: latest:3, every:1000, minutes:30, best:loss:min:2, pinned:10,20."
        ),
    ],
    grace_s: Annotated[
        float, typer.Option(min=0, help="Leave loose objects alone that are younger, in seconds.")
    ] = 3600.0,
    linger_s: Annotated[
        float, typer.Option(min=0, help="Leave what expired to those who still read it, for so many seconds.")
    ] = 60.0,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Delete the checkpoints that no policy keeps; the newest is always kept. Names what it deletes."""
    from flows import pruning, stores

    with clear_errors():
        url = stores.find(where, Path(runs_dir))
        pruned = pruning.prune(url, keep, now_s=time.time(), grace_s=grace_s, linger_s=linger_s)
        if as_json:
            print(json.dumps(pruned, indent=2))
        else:
            pruning.draw_pruning(screen, pruned)
        if pruned["problems"]:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def copy(
    source: Where,
    target: Annotated[str, typer.Argument(metavar="DST", help="A store's URL or directory.")],
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--step",
            min=0,
            help="The checkpoint's step. Repeatable. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All checkpoints, oldest first.")] = False,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Copy checkpoints between stores, as they are: each is there whole or not at all, proved on the way."""
    from flows import stores

    with clear_errors(), resumable("What was copied is kept: the same command goes on from there."):
        url = stores.find(source, Path(runs_dir))
        chosen = stores.choose_steps(
            url, steps or (), stores.Extent.ALL if everything else stores.Extent.NEWEST
        )
        with followed() as listener:
            copied = [stores.copy(url, target, step, listener=listener) for step in chosen]
        if as_json:
            print(json.dumps(copied, indent=2))
        else:
            stores.draw_copies(screen, copied)


@app.command()
def diff(
    first: Where,
    second: Where,
    step: Annotated[int | None, typer.Option(min=0, help="The first one's step.", show_default=False)] = None,
    other_step: Annotated[
        int | None,
        typer.Option(
            min=0, help="The second one's step. Default: --step, if it is a store.", show_default=False
        ),
    ] = None,
    format: Format = None,
    other_format: Format = None,
    rules: Rules = None,
    sizes: Sizes = None,
    other_rules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The second one's rules. Default: --rules with --set.",
            autocompletion=rule_names,
        ),
    ] = None,
    other_sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--other-set",
            metavar="size=N",
            help="A size for --other-rules; --set tells them none. Repeatable.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="How many threads read.")] = 2,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints of any layouts and formats, tensor by tensor. Exits with 1 if they differ.

    Tensors of equal fingerprints have equal bits and are not read. Rules, if given, name the tensors of
    foreign checkpoints: --rules those of both, unless --other-rules names others for the second. Where ranks
    hold copies of a tensor, these have to be equal, else there is nothing to compare.
    """
    with clear_errors(), resumable("Nothing was decided."):
        import checkpoint
        from flows import conversions, stores

        chosen = conversions.rules_of(conversions.Rules(rules, sizes or ()))
        others = conversions.Rules(other_rules, other_sizes or (), "--other-")
        other = conversions.rules_of(others) if other_rules or other_sizes else chosen
        settings = conversions.settings_of("1GiB", threads)
        one, two = (stores.find(each, Path(runs_dir)) for each in (first, second))
        conversions.check_read_by_rules(
            (one, format, chosen), (two, other_format, other if other is not chosen else None)
        )
        is_like_first = other_step is None and other_format is None and checkpoint.is_store(two)
        last = step if is_like_first else other_step
        with followed() as listener:
            compared = checkpoint.compare_places(
                checkpoint.Whereabouts(one, step, format, chosen),
                checkpoint.Whereabouts(two, last, other_format, other),
                settings=settings,
                listener=listener,
            )
        if as_json:
            print(json.dumps([conversions.describe_difference(each) for each in compared], indent=2))
        else:
            conversions.draw_differences(screen, compared)
        if any(each.verdict is not checkpoint.Verdict.EQUAL for each in compared):
            raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    source: Where,
    to: Annotated[str, typer.Option(metavar="LAYOUT", help="Such as replica=2,shard=4,tensor=2.")],
    rank: Annotated[int, typer.Option(min=0, help="The rank of that layout.")] = 0,
    step: Step = None,
    rules: Rules = None,
    sizes: Sizes = None,
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Tell what a rank of a layout would read of a checkpoint: bytes, ranges, packs. Reads the index only."""
    with clear_errors():
        import checkpoint
        from flows import conversions, stores

        layout = conversions.layout_of(to)
        chosen = conversions.rules_of(conversions.Rules(rules, sizes or ()))
        store = checkpoint.open_store(stores.find(source, Path(runs_dir)))
        share = checkpoint.share_of_rank(store, layout, rank, step=step, rules=chosen)
        if as_json:
            print(json.dumps(asdict(share), indent=2))
        else:
            conversions.draw_share(screen, share)
