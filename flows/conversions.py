"""What the command line does with conversions and comparisons, and how it shows them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

import checkpoint
from flows.tables import draw_table, parse_bytes, spell_bytes
from tasks.errors import SpecError

_MAX_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules as they are named on a command line, by options that begin with `prefix`."""

    name: str | None
    sizes: Sequence[str]
    prefix: str = "--"


@contextmanager
def asked() -> Iterator[None]:
    """Call what cannot be meant wrong usage, as long as it is found before anything is read."""
    try:
        yield
    except (checkpoint.CheckpointError, ValueError) as error:
        raise SpecError(str(error)) from None


def rules_of(rules: Rules) -> "checkpoint.RuleChoice | None":
    """Return the rules that are named. Raises SpecError."""
    with asked():
        if rules.name is None:
            if rules.sizes:
                raise ValueError(
                    f"{rules.prefix}set tells the rules of a model its sizes: name them with "
                    f"{rules.prefix}rules"
                )
            return None
        return checkpoint.choose_rules(rules.name, list(rules.sizes))


def check_read_by_rules(*sides: "tuple[str, str | None, checkpoint.RuleChoice | None]") -> None:
    """See that rules of two sides (place, format, rules) have something foreign to read. Raises SpecError.

    Rules of the first serve the second as well, if it has none of its own.
    """
    (first, format, rules), (second, other_format, other_rules) = sides
    is_foreign = format is not None or not checkpoint.is_store(first)
    is_other_foreign = other_format is not None or not checkpoint.is_store(second)
    has_use = is_foreign or (is_other_foreign and other_rules is None)
    if (rules is not None and not has_use) or (other_rules is not None and not is_other_foreign):
        raise SpecError("rules read foreign checkpoints, and a store needs none: leave out those of a store")


def settings_of(
    budget: str, threads: int, overflow: "checkpoint.Overflow | None" = None
) -> "checkpoint.ConversionSettings":
    """Return settings within a memory budget such as "1GiB". Raises SpecError."""
    with asked():
        return checkpoint.ConversionSettings(
            parse_bytes(budget), threads, overflow=overflow or checkpoint.Overflow.REFUSED
        )


def layout_of(text: str) -> str:
    """Return a layout's text if it is one. Raises SpecError."""
    with asked():
        checkpoint.parse_layout(text)
    return text


def dtype_of(text: str | None) -> str | None:
    """Return the name of a dtype if it is one. Raises SpecError."""
    with asked():
        return None if text is None else checkpoint.parse_dtype(text)


def ties_of(texts: Sequence[str]) -> dict[str, str]:
    """Return which names are other names of a weight. Raises SpecError."""
    with asked():
        return checkpoint.parse_ties(texts)


def describe_report(report: "checkpoint.ConversionReport") -> dict[str, Any]:
    """Return a report as plain data."""
    told = asdict(report)
    told["proofs"] = [
        {"name": one.name, "how": one.how, "fingerprint": f"{one.fingerprint:016x}"} for one in report.proofs
    ]
    told["proved"] = {
        how: sum(one.how == how for one in report.proofs) for how in ("fingerprint", "reference")
    }
    return told


def draw_report(console: Console, report: "checkpoint.ConversionReport") -> None:
    """Say what a conversion did, or would do."""
    will = "would be " if report.is_dry else ""
    size = f"{report.num_tensors} tensors, {spell_bytes(report.num_bytes)}"
    what = f"step {report.step} of {report.source}, {size}"
    if not report.is_new:
        console.print(f"{what}: was in {report.target} already", markup=False, soft_wrap=True)
        _draw_notes(console, report)
        return
    console.print(f"{what} -> {report.target}", markup=False, soft_wrap=True)
    most = "" if report.is_exact else "at most "
    rows = [
        ("layout", report.layout),
        ("chunks", report.num_chunks),
        (f"{will}read", spell_bytes(report.read_bytes)),
        (f"{will}written", most + spell_bytes(report.written_bytes)),
        ("peak memory", _peak(report)),
    ]
    if report.num_resumed_bytes:
        rows.append(("done by an earlier attempt", spell_bytes(report.num_resumed_bytes)))
    if not report.is_dry:
        rate = report.num_bytes / max(report.seconds, 1e-9)
        rows.append(("took", f"{report.seconds:.2f} s, {spell_bytes(rate)}/s"))
        rows.append(("proved", _proved(report)))
    draw_table(console, "", ("", ""), rows)
    _draw_notes(console, report)


def _draw_notes(console: Console, report: "checkpoint.ConversionReport") -> None:
    for note in report.notes:
        console.print(f"note: {note}", markup=False, style="yellow")


def _peak(report: "checkpoint.ConversionReport") -> str:
    budget = f"{spell_bytes(report.peak_bytes)} of buffers at most"
    return budget if report.is_dry else f"{budget}; the process grew by {spell_bytes(report.grown_bytes)}"


def _proved(report: "checkpoint.ConversionReport") -> str:
    told = describe_report(report)["proved"]
    equal = f"{told['fingerprint']} tensors: the source's content fingerprint"
    changed = f"\n{told['reference']} tensors, whose values were changed: that of a second computation"
    return equal + (changed if told["reference"] else "")


def describe_difference(one: "checkpoint.Compared") -> dict[str, Any]:
    """Return how one tensor compares, as plain data."""
    sides = [
        None if spec is None else {"dtype": spec.dtype, "shape": list(spec.shape)}
        for spec in (one.first, one.second)
    ]
    return {
        "name": one.name,
        "verdict": one.verdict.value,
        "first": sides[0],
        "second": sides[1],
        "max_abs": None if one.max_abs is None else _finite(one.max_abs),
        "num_different": one.num_different,
    }


def draw_differences(console: Console, compared: Sequence["checkpoint.Compared"]) -> None:
    """Say how two checkpoints compare; only what differs is listed."""
    told = [describe_difference(one) for one in compared]
    wrong = [one for one in told if one["verdict"] != "equal"]
    console.print(f"{len(told) - len(wrong)} of {len(told)} tensors have equal bits", markup=False)
    rows = [
        (one["name"], one["verdict"], _kind(one["first"]), _kind(one["second"]), *_distance(one))
        for one in wrong[:_MAX_SHOWN]
    ]
    if rows:
        draw_table(console, "", ("tensor", "", "first", "second", "elements", "max abs"), rows)
    if len(wrong) > _MAX_SHOWN:
        console.print(f"and {len(wrong) - _MAX_SHOWN} more (--json lists them all)")


def draw_share(console: Console, share: "checkpoint.RankShare") -> None:
    """Say what a rank would read."""
    rows = [
        (
            "its share",
            f"{share.num_boxes} boxes of {share.num_tensors} tensors, {spell_bytes(share.num_bytes)}",
        ),
        ("chunks it lies in", f"{share.num_chunks}, {spell_bytes(share.stored_bytes)} stored"),
        ("read", f"{spell_bytes(share.read_bytes)} in {share.num_ranges} ranges of {len(share.packs)} packs"),
    ]
    draw_table(console, f"step {share.step}: rank {share.rank} of {share.layout}", ("", ""), rows)
    packs = [(pack.key, pack.num_ranges, spell_bytes(pack.num_bytes)) for pack in share.packs[:_MAX_SHOWN]]
    draw_table(console, "", ("pack", "ranges", "bytes"), packs)


def _kind(spec: dict[str, Any] | None) -> str:
    return "-" if spec is None else f"{spec['dtype']} {'x'.join(map(str, spec['shape'])) or 'scalar'}"


def _distance(one: dict[str, Any]) -> tuple[str, str]:
    if one["max_abs"] is None:
        return "", ""
    return str(one["num_different"]), str(one["max_abs"])


def _finite(value: float) -> float | str:
    return value if value == value and abs(value) != float("inf") else str(value)
