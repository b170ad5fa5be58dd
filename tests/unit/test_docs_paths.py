"""Whatever the documents name in this repository is there: a claim whose proof was renamed proves nothing."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = "tests|checkpoint|elastic|flows|tasks|deploy|examples|docs"
NAMED = re.compile(rf"(?<![\w/.-])(?:{ROOMS})/[\w./*-]+\.(?:py|md|toml|json|yaml|txt|c|png)\b")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page):
    named = {path for path in NAMED.findall(page.read_text()) if "NAME" not in path}
    assert sorted(path for path in named if not list(ROOT.glob(path))) == []


def test_claims_name_files():
    assert len(NAMED.findall((ROOT / "docs/claims.md").read_text())) > 100
