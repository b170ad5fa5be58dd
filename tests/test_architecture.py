"""The house stands as drawn: import contracts, top level, file and function sizes, names, threads, signs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("flows", "tasks", "elastic", "checkpoint")
TOP_LEVEL = {
    *FLOORS,
    *("tests", "deploy", "docs", "examples"),
    *("pyproject.toml", "constraints.txt", "Makefile", "LICENSE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
}
LEFT_BEHIND = {
    "runs",
    "holdfast.egg-info",
    "build",
    "dist",
    "__pycache__",
}  # by runs and installs; git ignores them
DOOR = "flows/cli"  # and its verbs, flows/cli_*.py
READS_ENVIRONMENT = {f"{DOOR}.py", "flows/deployments.py"}
MAY_START_THREADS = (
    "checkpoint/engine/pipeline.py",
    "checkpoint/engine/snapshot.py",
    "checkpoint/keeper/",
    "elastic/runtime/",
)
STARTS_THREADS = {"Thread", "Timer", "ThreadPool", "ThreadPoolExecutor", "to_thread", "start_new_thread"}
VAGUE_CLASS = re.compile(r"Manager|Helper|Util|Misc|^Base|Base$")
VAGUE_MODULE = {"util", "utils", "helper", "helpers", "manager", "misc", "common", "base"}
MAX_LINES, MAX_STATEMENTS, MAX_PARAMETERS, MAX_PROTOCOL_METHODS = 400, 40, 6, 5

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def _nodes_of(path: Path) -> list[tuple[str, ast.AST]]:
    name = _name(path)
    return [(f"{name}:{getattr(node, 'lineno', 1)}", node) for node in ast.walk(_tree(path))]


@cache
def _functions_of(path: Path) -> list[tuple[str, Function]]:
    return [(place, node) for place, node in _nodes_of(path) if isinstance(node, Function)]


def _nodes(*rooms: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield ("file:line", node) for every node of the rooms' files."""
    for path in _files(*rooms):
        yield from _nodes_of(path)


def _functions(*rooms: str) -> Iterator[tuple[str, Function]]:
    for path in _files(*rooms):
        yield from _functions_of(path)


def _parameters(function: Function) -> list[ast.arg]:
    """List the parameters a caller may give, without self and cls."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return [*named, *arguments.kwonlyargs]


def _statements(body: list[ast.stmt]) -> int:
    """Count statements at every depth; a nested function or class counts as one here."""
    count = 0
    for statement in body:
        count += 1
        if isinstance(statement, Function | ast.ClassDef):
            continue
        for field in ("body", "orelse", "finalbody"):
            count += _statements(getattr(statement, field, []))
        branches = [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
        count += sum(_statements(branch.body) for branch in branches)
    return count


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _reads_environment(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="getenv")):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get")):
            return True
        case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
            return True
    return False


def _is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)


def test_the_import_contracts_of_the_design_hold():
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_is_exactly_the_house():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - LEFT_BEHIND
    assert found == TOP_LEVEL


def test_the_packages_that_are_imported_from_anywhere_lie_in_this_repository(tmp_path):
    script = f"import importlib.util as u; [print(u.find_spec(name).origin) for name in {FLOORS!r}]"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"is the project installed (pip install -e)? {done.stderr}"
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in FLOORS]


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in _files(*FLOORS)}
    assert [_name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_file_is_longer_than_four_hundred_lines():
    lengths = {_name(p): len(p.read_text("utf-8").splitlines()) for p in _files(*FLOORS, "tests", "examples")}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_file_has_its_sign_a_docstring_on_its_first_line():
    bare = []
    for path in _files(*FLOORS, "tests", "examples"):
        first = path.read_text("utf-8").partition("\n")[0]
        if not first.startswith(('"""', 'r"""')) or ast.get_docstring(_tree(path)) is None:
            bare.append(_name(path))
    assert bare == []


def test_no_function_has_more_than_forty_statements():
    lengths = {}
    for place, node in _functions(*FLOORS, "tests"):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lengths[f"{place} {node.name}"] = _statements(body)
    assert {name: count for name, count in lengths.items() if count > MAX_STATEMENTS} == {}


def test_no_function_takes_more_than_six_parameters():
    counts = {
        f"{place} {node.name}": len(_parameters(node))
        for place, node in _functions(*FLOORS)
        if not (place.startswith(DOOR) and node.decorator_list)  # a command's options are parameters
    }
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_no_parameter_is_a_boolean():
    found = [
        f"{place} {node.name}({parameter.arg})"
        for place, node in _functions(*FLOORS)
        for parameter in _parameters(node)
        if parameter.annotation and ast.unparse(parameter.annotation) == "bool" and not place.startswith(DOOR)
    ]
    assert found == []


def test_threads_are_started_only_where_the_design_names_them():
    found = [
        place
        for place, node in _nodes(*FLOORS)
        if isinstance(node, ast.Call)
        and _called(node) in STARTS_THREADS
        and not place.startswith(MAY_START_THREADS)
    ]
    assert found == []


def test_code_is_blocking_without_async_functions_of_our_own():
    found = [place for place, node in _nodes(*FLOORS) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]
    assert found == []


def test_only_the_door_prints():
    found = [
        place
        for place, node in _nodes(*FLOORS)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not place.startswith(DOOR)
    ]
    assert found == []


def test_the_environment_is_read_only_at_the_door_and_in_deployments():
    found = [
        place
        for place, node in _nodes(*FLOORS)
        if _reads_environment(node) and place.partition(":")[0] not in READS_ENVIRONMENT
    ]
    assert found == []


def test_flows_and_tasks_keep_their_annotations_real_for_prefect():
    found = [
        place
        for place, node in _nodes("flows", "tasks")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    assert found == []


def test_no_name_is_vague():
    classes = [
        f"{place} {node.name}"
        for place, node in _nodes(*FLOORS)
        if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name)
    ]
    modules = [_name(path) for path in _files(*FLOORS) if path.stem in VAGUE_MODULE]
    assert classes + modules == []


def test_a_protocol_has_at_most_five_methods():
    sizes = {
        f"{place} {node.name}": sum(isinstance(item, Function) for item in node.body)
        for place, node in _nodes(*FLOORS)
        if isinstance(node, ast.ClassDef) and _is_protocol(node)
    }
    assert {name: size for name, size in sizes.items() if size > MAX_PROTOCOL_METHODS} == {}
