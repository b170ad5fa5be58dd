"""Is this machine fit to train and to keep checkpoints? Mends nothing, imports neither Prefect nor Ray."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console

import checkpoint
from flows.server import LOOPBACK, is_free, is_healthy
from flows.tables import draw_table, spell_bytes

_CORE = ("torch", "numpy", "fsspec", "s3fs", "zstandard", "xxhash")
_TRAIN = ("ray", "prefect", "fastapi", "sqlalchemy", "pydantic", "safetensors")
# Newer ones break Prefect 3.8's server or, worse, let its schedules stop in silence.
_BELOW = {"fastapi": (0, 151), "sqlalchemy": (2, 1)}
_FEW_BYTES = 2 << 30


def examine(store: str | None, port: int, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Look at versions, memory, disk, the server and a store; `trouble` is empty where all is well."""
    findings = [_finding("python", platform.python_version(), "")]
    findings += [_package(name, "reinstall Holdfast") for name in _CORE]
    findings += [_package(name, "for training: pip install 'holdfast[train]'") for name in _TRAIN]
    findings += [_fingerprints(), _memory(), _disk(), _server(port, environment)]
    return findings if store is None else [*findings, *_store(store)]


def draw(console: Console, findings: list[dict[str, Any]]) -> None:
    """Draw what was found."""
    rows = [(each["what"], each["found"], each["trouble"] or "ok") for each in findings]
    draw_table(console, "", ("what", "found", "verdict"), rows)


def _finding(what: str, found: str, trouble: str) -> dict[str, Any]:
    return {"what": what, "found": found, "trouble": trouble}


def _package(name: str, remedy: str) -> dict[str, Any]:
    try:
        found = version(name)
    except PackageNotFoundError:
        return _finding(name, "not installed", remedy)
    limit = _BELOW.get(name)
    if limit and tuple(int(part) for part in found.split(".")[:2]) >= limit:
        below = ".".join(map(str, limit))
        return _finding(name, found, f"Prefect's server does not work with it: pip install '{name}<{below}'")
    return _finding(name, found, "")


def _fingerprints() -> dict[str, Any]:
    found = checkpoint.fingerprinted_by()
    slower = ", at a fraction of the speed: for more install a C compiler, then Holdfast again"
    return _finding("fingerprints", f"made by {found}{slower if found == 'numpy' else ''}", "")


def _memory() -> dict[str, Any]:
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    found = f"{os.cpu_count()} processors, {spell_bytes(num_bytes)} of memory free"
    trouble = "too little for workers and an arena: lower world.workers and checkpoint.arena_mib"
    return _finding("machine", found, trouble if num_bytes < _FEW_BYTES else "")


def _disk() -> dict[str, Any]:
    num_bytes = shutil.disk_usage(".").free
    return _finding(
        "disk", f"{spell_bytes(num_bytes)} free here", "make room for runs" if num_bytes < _FEW_BYTES else ""
    )


def _server(port: int, environment: Mapping[str, str]) -> dict[str, Any]:
    if configured := environment.get("PREFECT_API_URL"):
        address = configured.removesuffix("/").removesuffix("/api")
        trouble = (
            ""
            if is_healthy(address)
            else "does not answer: start it, or unset PREFECT_API_URL to use one of our own"
        )
        return _finding("Prefect server", f"{configured} (PREFECT_API_URL)", trouble)
    if is_healthy(f"http://{LOOPBACK}:{port}"):
        return _finding("Prefect server", f"answers on port {port}", "")
    if is_free(port):
        return _finding("Prefect server", f"none; port {port} is free for `holdfast serve`", "")
    return _finding(
        "Prefect server", f"port {port} is taken by something else", "use `holdfast serve --port`"
    )


def _store(url: str) -> list[dict[str, Any]]:
    try:
        probe = checkpoint.probe(checkpoint.open_store(url))
    except checkpoint.CheckpointError as error:
        return [_finding("store", url, str(error))]
    return [
        _finding("store", f"{url}, {probe.seconds * 1000:.0f} ms for a probe", probe.problem),
    ]
