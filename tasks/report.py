"""Tell how a run went: report.json, a picture of its course, and artifacts in the Prefect UI."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

import elastic
from tasks.files import write_whole
from tasks.findings import Findings, gather, write_report
from tasks.picture import draw_course
from tasks.runs import Run, open_run
from tasks.summary import FAILURE_HEAD, as_data_uri, describe_failures, write_markdown
from tasks.telling import artifact_key, say


@contextmanager
def reported(run: Run) -> Iterator[None]:
    """Report on the run whichever way the block is left, by an error or an interruption too."""
    try:
        yield
    except elastic.Fenced:
        raise  # the run belongs to another driver now, and so does its report
    except BaseException as failure:
        conclude(run, gather(run, failure))
        raise
    report(run)


@task(
    name="report",
    task_run_name="report {run.name}",
    retries=1,
    retry_delay_seconds=2,
    timeout_seconds=300,
    cache_policy=NO_CACHE,
)
def report(run: Run) -> Findings:
    """Write report.json and timeline.png, and show both in the Prefect UI."""
    findings = gather(run)
    picture = conclude(run, findings)
    show_summary(findings, picture)
    say("report", f"the report is {run.report_path}, its picture {run.picture_path}")
    return findings


@task(name="report recovery", timeout_seconds=300, cache_policy=NO_CACHE)
def report_recovery(name: str, runs_dir: str) -> None:
    """Show in the Prefect UI what was broken on purpose, and how the run came back."""
    findings = gather(open_run(name, Path(runs_dir)))
    rows = [dict(zip(FAILURE_HEAD, row, strict=True)) for row in describe_failures(findings)]
    create_table_artifact(table=rows, key=artifact_key("recovery", name), description=f"Drill of run {name}")
    say("drill", f"{len(rows)} failures and recoveries; the run is {findings.status}")


def conclude(run: Run, findings: Findings) -> bytes | None:
    """Write what is known of a run into its directory; return the picture."""
    picture = draw_course(findings)
    if picture is not None:
        write_whole(run.picture_path, picture)
    write_report(run, findings)
    return picture


def show_summary(findings: Findings, picture: bytes | None) -> None:
    """Show a run's report and its picture on its page in the Prefect UI."""
    create_markdown_artifact(
        markdown=write_markdown(findings, picture),
        key=artifact_key("summary", findings.run),
        description=f"Report of run {findings.run}",
    )
    if picture is not None:
        create_image_artifact(
            image_url=as_data_uri(picture),
            key=artifact_key("course", findings.run),
            description=f"Course of run {findings.run}",
        )
