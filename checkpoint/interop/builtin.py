"""The rule sets that come with the package, by name."""

from importlib.resources import files

from checkpoint.errors import FormatError
from checkpoint.interop.document import RuleSet
from checkpoint.interop.grammar import read_rules

_FOLDER = files(__package__) / "rules"


def builtin_names() -> list[str]:
    """List the names of the rule sets; models, which only declare tensors for others, are left out."""
    names = sorted(
        entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml")
    )
    return [name for name in names if not name.startswith("model-")]


def builtin_rules(name: str) -> RuleSet:
    """Return a built-in rule set. Raises FormatError if there is none of this name."""
    return read_rules(find_document(name), name, find_document)


def find_document(name: str) -> str:
    """Return the text of a built-in document, for another to extend. Raises FormatError."""
    path = _FOLDER / f"{name}.yaml"
    if "/" in name or not path.is_file():
        raise FormatError(f"there is no built-in document {name!r}; there are {', '.join(builtin_names())}")
    return path.read_text(encoding="utf-8")
