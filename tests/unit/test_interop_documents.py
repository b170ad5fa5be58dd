"""Rule documents that are wrong: an error that names the line. And all that expressions do not have."""

import pytest

from checkpoint.errors import FormatError, Misuse
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.placing import resolve_sizes

WRONG_DOCUMENTS = [
    ("", "mine.yaml is empty"),
    ("[1, 2]", "line 1: a rule document is a mapping"),
    ("rules: 2", "line 1: this reads version 1"),
    ("rules: 1\nmap: [{from: a, to: b, form: c}]", "line 2: a rule has no 'form': did you mean 'from'"),
    ("rules: 1\nmaps: []", "line 2: a rule document has no 'maps': did you mean 'map'"),
    ("rules: 1\nrules: 1", "line 2: the key 'rules' is here twice"),
    ("rules: 1\nmap: [{from: a}]", "line 2: a rule lacks 'to'"),
    ("rules: 1\nmap: {from: a}", "line 2: `map` is a list"),
    ("rules: 1\nmap: [{from: 'a{b', to: c}]", "opens a brace and does not close it"),
    ("rules: 1\nmap: [{from: 'a}', to: c}]", "closes a brace that it never opened"),
    ("rules: 1\nmap: [{from: 'a{B}', to: c}]", "a capture is {name} or {name:REGEX}, not '{B}'"),
    ("rules: 1\nmap: [{from: 'a{b:}', to: c}]", "a capture is"),
    ("rules: 1\nmap: [{from: 'a{b:(}', to: c}]", "no sound regular expression"),
    ("rules: 1\nmap: [{from: a, to: 'b{c}'}]", r"\['c'\] are not captured by `from`"),
    ("rules: 1\nmap: [{from: a, to: b, transpose: [0, 0]}]", "lists every dim once"),
    ("rules: 1\nmap: [{from: a, to: b, dtype: float33}]", "line 2: there is no dtype 'float33'"),
    ("rules: 1\nmap: [{from: a, to: b, copy: maybe}]", "`copy` is optional or required"),
    ("rules: 1\nmap: [{from: a, to: b, drop: maybe}]", "`drop` is true or false"),
    (
        "rules: 1\nmap: [{from: a, to: b, axes: {tensors: 0}}]",
        "there is no axis 'tensors': there are replica",
    ),
    (
        "rules: 1\nmap: [{from: a, to: b, axes: {tensor: row}}]",
        "or one of same, mean, first, last, ends, one",
    ),
    ("rules: 1\nmap: [{from: a, to: b, axes: {tensor: {dim: -1}}}]", "`dim` is a number from 0 on, not '-1'"),
    ("rules: 1\nmap: [{from: a, split: {dim: 0, pieces: []}}]", "a split has at least one piece"),
    (
        "rules: 1\nmap: [{from: a, split: {dim: 0, pieces: [{to: b, size: heads}]}}]",
        r"`size` uses \['heads'\], which are no sizes",
    ),
    (
        "rules: 1\nmap: [{from: a, to: b, axes: {tensor: {dim: 0, size: share(3, tensor)}}}]",
        "put quotes around an expression that has a comma",
    ),
    ("rules: 1\nmap: [{from: a, to: b, unstack: {dim: 0, number: n, count: 2}}]", r"apart by \['n'\]"),
    (
        "rules: 1\nmap: [{from: 'a{n}', to: 'b{n}', unstack: {dim: 0, number: n, count: 2}}]",
        "the number of `unstack` is a new name",
    ),
    (
        "rules: 1\nmap: [{from: a, to: b, stack: {dim: 0, number: n, count: 2}}]",
        "`stack` is a capture of `from`",
    ),
    ("rules: 1\nnumbers: {n: layers over pipeline}", "a number is `SIZE over AXIS`"),
    ("rules: 1\nsizes: {n: 2}\nnumbers: {n: n over layers}", "line 3: there is no axis 'layers'"),
    (
        "rules: 1\nsizes: {n: 2}\nnumbers: {n: n over pipeline}\n"
        "map: [{from: 'a{n}', to: 'b{n}', axes: {pipeline: one}}]",
        r"line 4: the axes \['pipeline'\] are told by the numbers",
    ),
    ("rules: 1\nstates: [{from: 'a.{param}', to: b}]", "both names of a state have {param}"),
    ("rules: 1\ntensors: [{name: 'a{n}', shape: [2]}]", "`each` has to count"),
    ("rules: 1\nmap: [{form: a, to: b}]", "lacks 'from': is 'form' meant to be it"),
    ("rules: 1\nsizes: {a: b, b: 1}", r"line 2: a size uses \['b'\]"),
    ("rules: 1\nabout: &x y\nname: *x", "uses YAML aliases"),
    ("rules: 1\nmap: [{from: [", "is no YAML"),
    ("rules: 1\n" + "[" * 3000, "is no YAML"),
]


@pytest.mark.parametrize(("document", "message"), WRONG_DOCUMENTS, ids=[m for _, m in WRONG_DOCUMENTS])
def test_a_document_that_cannot_be_is_refused_with_the_line(document: str, message: str):
    with pytest.raises(FormatError, match=message.replace("{", r"\{").replace("}", r"\}")):
        read_rules(document, "mine.yaml")


EXPRESSIONS = [
    "__import__('os')",
    "a.b",
    "a[0]",
    "a ** 2",
    "a / 2",
    "1.5",
    "'a'",
    "a < b < c",
    "share(a)",
    "share(a, 3)",
    "rank(a, tensor)",
    "min()",
    "min(*a)",
    "lambda: 1",
    "a := 1",
    "a if b else c",
    "(" * 200,
    "1" * 400,
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_expression_language_has_nothing_else(text: str):
    with pytest.raises(FormatError, match=r"mine.yaml, line 2"):
        read_rules(f'rules: 1\nsizes: {{a: 1, b: 1, c: 1, d: "{text}"}}', "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 // (a - a)", "cannot be worked out"),
        ("a * 1000000000 * 1000000000 * 1000000000", "beyond every tensor"),
        ("share(b, tensor)", "b lists 3 ranks, but the axis 'tensor' has 1"),
    ],
)
def test_an_expression_that_cannot_be_worked_out_says_why(text: str, message: str):
    rules = read_rules(f'rules: 1\nsizes: {{a: 7, b: [1, 2, 3], c: "{text}"}}', "mine.yaml")
    with pytest.raises(Misuse, match=message):
        resolve_sizes(rules, {})


def test_sizes_are_given_or_have_a_default():
    rules = read_rules("rules: 1\nsizes: {a: , b: 2 * a, c: [1, 2]}", "mine.yaml")
    assert resolve_sizes(rules, {"a": 3}) == {"a": 3, "b": 6, "c": (1, 2)}
    assert resolve_sizes(rules, {"a": (1, 1), "b": 9}) == {"a": (1, 1), "b": 9, "c": (1, 2)}
    with pytest.raises(FormatError, match=r"mine.yaml has to be told the size 'a'"):
        resolve_sizes(rules, {})
    with pytest.raises(FormatError, match=r"knows no sizes \['d'\]"):
        resolve_sizes(rules, {"a": 1, "d": 1})


def test_the_documents_in_the_manual_can_be_read(repository):
    manual = (repository / "docs" / "rules.md").read_text("utf-8")
    documents = [block.partition("```")[0] for block in manual.split("```yaml\n")[1:]]
    assert documents
    for number, text in enumerate(documents):
        assert read_rules(text, f"document {number} of docs/rules.md").rules
