"""Ratchets: public names, command-line options and spec keys change only as a diff of a golden file."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer.main

from flows.cli import app
from tasks.spec import RunSpec

GOLDEN = Path(__file__).parent / "golden" / "ratchets.json"
FACES = ("checkpoint", "elastic")


def public_names(package: str) -> list[str]:
    """List what a face exports, sorted."""
    return sorted(importlib.import_module(package).__all__)


def command_line(command: Any, path: str = "holdfast") -> Iterator[tuple[str, list[str]]]:
    """Yield (command, its arguments and options) for a command and everything below it."""
    options = [name for p in command.params for name in (*p.opts, *p.secondary_opts)]
    yield path, sorted(options)
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from command_line(child, f"{path} {name}")


def spec_keys(schema: Mapping[str, Any], node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a JSON schema as dotted paths; below a list `key[]`, below a mapping `key.*`."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    for alternative in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from spec_keys(schema, alternative, prefix)
    if "items" in node:
        yield from spec_keys(schema, node["items"], f"{prefix}[]")
    if isinstance(values := node.get("additionalProperties"), dict):
        yield from spec_keys(schema, values, f"{prefix}.*")
    for key, value in node.get("properties", {}).items():
        path = f"{prefix}.{key}" if prefix else key
        yield path
        yield from spec_keys(schema, value, path)


def _command_line() -> dict[str, list[str]]:
    return dict(command_line(typer.main.get_command(app)))


def _spec() -> list[str]:
    schema = RunSpec.model_json_schema()
    return sorted(set(spec_keys(schema, schema)))


PARTS: Mapping[str, Callable[[], Any]] = {
    **{face: partial(public_names, face) for face in FACES},
    "command_line": _command_line,
    "spec": _spec,
}


@pytest.mark.parametrize("part", PARTS)
def test_what_users_build_upon_changes_only_on_purpose(part: str):
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert PARTS[part]() == golden[part], "on purpose? then: make ratchets"


def test_every_exported_name_exists_and_is_exported_once():
    for face in FACES:
        module = importlib.import_module(face)
        assert len(module.__all__) == len(set(module.__all__))
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        json.dumps({part: names() for part, names in PARTS.items()}, indent=2) + "\n", encoding="utf-8"
    )
