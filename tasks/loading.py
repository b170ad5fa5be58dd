"""From a TOML file and `key=value` settings to a RunSpec, with one clear error per mistake."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tasks.errors import SpecError
from tasks.spec import FaultSpec, RunSpec

# The job's settings are the job's own business: any key may stand below this one.
_OPEN = "job.settings"


def load_spec(path: Path | None, settings: Sequence[str] = ()) -> RunSpec:
    """Load a specification from a TOML file and settings such as `training.steps=200`, over the defaults.

    Raises SpecError for an unreadable file, an unknown key, a key set twice, and a value out of bounds.
    """
    tree = {} if path is None else _read_toml(path)
    origins = dict.fromkeys(_leaves(tree), f"in {path}")
    for setting in settings:
        key, value = _parse_setting(setting)
        _refuse_second(key, origins, setting)
        origins[key] = f"by {setting}"
        _plant(tree, key, value)
    return check_spec(tree)


def read_spec(path: Path) -> RunSpec:
    """Read the JSON specification that a run was made from."""
    try:
        return RunSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise SpecError(
            f"{path} is not a specification this version understands:\n{_explain(error)}"
        ) from error


def check_spec(tree: Mapping[str, Any]) -> RunSpec:
    """Turn plain nested values into a RunSpec, or raise SpecError with one line per mistake."""
    if unknown := [message for key in _leaves(tree) if (message := _complain_of_key(key))]:
        raise SpecError("\n".join(unknown))
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError(_explain(error)) from error


def describe_keys() -> list[tuple[str, str, str, str]]:
    """List every key with its default, its bounds and its meaning."""
    return [
        (key, _spell_default(field), _spell_bounds(field), field.description or "")
        for key, field in _fields(RunSpec, "")
    ]


def known_keys() -> list[str]:
    """List every key of a specification as `section.key`."""
    return [key for key, _ in _fields(RunSpec, "")]


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _spell_default(field: FieldInfo) -> str:
    return "" if field.default is None else json.dumps(field.default)


def _spell_bounds(field: FieldInfo) -> str:
    bounds = {type(each): each for each in field.metadata}
    match (bounds.get(Ge), bounds.get(Gt), bounds.get(Le)):
        case (Ge(ge=low), _, Le(le=high)):
            return f"{low} to {high}"
        case (Ge(ge=low), _, _):
            return f"at least {low}"
        case (_, Gt(gt=low), _):
            return f"above {low}"
        case _:
            return " or ".join(map(str, get_args(field.annotation))) if _is_choice(field) else ""


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the specification {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not TOML: {error}") from error


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Split `key=value`; the value is TOML, or else a plain string."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise SpecError(f"--set {setting!r} is not of the form section.key=value, such as training.steps=200")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text.strip()
    return key, parsed["value"] if len(parsed) == 1 else text.strip()


def _refuse_second(key: str, origins: Mapping[str, str], setting: str) -> None:
    """Refuse a key that is set already, or that lies in or around one that is."""
    for other, origin in origins.items():
        if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
            raise SpecError(
                f"{key} is set twice, {origin} and by {setting}; none overrides another, so leave one out"
            )


def _plant(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    branch: Any = tree
    for section in sections:
        branch = branch.setdefault(section, {})
        if not isinstance(branch, dict):
            raise SpecError(f"{key} cannot be set: {section} is a value, not a section")
    branch[last] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of everything that is set; an empty section sets nothing."""
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, Mapping) and (value or key in RunSpec.model_fields):
            yield from _leaves(value, f"{key}.")
        else:
            yield key


def _complain_of_key(key: str) -> str | None:
    known = known_keys()
    sections = set(RunSpec.model_fields)
    if key in known or key in sections or key.startswith(f"{_OPEN}."):
        return None
    nearest = _nearest(key, known)
    hint = (
        f"; did you mean {nearest}?" if nearest else f"; the sections are {', '.join(RunSpec.model_fields)}"
    )
    return f"unknown key {key}{hint}"


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """Find the key that was probably meant: by its whole dotted name, or by its last part alone."""
    if whole := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return whole[0]
    by_last = {name.rpartition(".")[2]: name for name in known}
    last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last), n=1, cutoff=0.6)
    if last:
        return by_last[last[0]]
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return whole[0] if whole else None


def _explain(error: ValidationError) -> str:
    return "\n".join(_explain_one(details) for details in error.errors(include_url=False))


def _explain_one(details: Any) -> str:
    """Say one mistake in one line: the key, its value, and what it should be."""
    location, message = details["loc"], details["msg"].removeprefix("Value error, ")
    if not location:
        return str(message)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    match details["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            fields = ", ".join(sorted(_fields_at(location)))
            return f"unknown key {key}" + (f"; there are {fields}" if fields else "")
        case "value_error":  # our own: it says what may be repeated
            return f"{key}: {message}"
        case _:
            wish = message.replace("Input should be", "it should be", 1)
            return f"{key} = {details['input']!r}: {wish[:1].lower()}{wish[1:]}"


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Name the fields beside an unknown one inside a list of cards, such as a drill's faults."""
    return list(FaultSpec.model_fields) if "faults" in location else []
