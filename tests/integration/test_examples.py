"""Every example runs, is short, and is what the README shows."""

from pathlib import Path

import checkpoint
from examples import own_loop

REPOSITORY = Path(__file__).parents[2]


def test_the_own_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    assert own_loop.main(url) == 50
    assert own_loop.main(url) == 100
    store = checkpoint.open_store(url)
    assert checkpoint.Catalog(store).latest() == 100
    assert checkpoint.verify(store).is_sound


def test_examples_are_short_and_the_readme_shows_them_as_they_are() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for path in sorted((REPOSITORY / "examples").glob("*.py")):
        text = path.read_text()
        num_lines = sum(bool(line.strip()) for line in text.splitlines())
        assert num_lines < 20 or path.name != "own_loop.py", "the engine alone needs fewer than 20 lines"
        assert len(text.splitlines()) <= 40, f"{path.name} has more than 40 lines"
        assert text.strip() in readme, f"README.md does not show {path.name} as it is"
