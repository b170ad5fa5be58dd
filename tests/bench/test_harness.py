"""The benchmark harness says what it measured, and puts what missed its goal last."""

import json

import pytest
from rich.console import Console

from tests.bench.__main__ import choose
from tests.bench.harness import Goal, Row, draw, row, write_results


def test_the_ratio_is_ours_to_the_best_peer_at_the_better_end():
    peers = {"one": 2.0, "two": 4.0}
    assert row("time", "s", ours=1.0, peers=peers).ratio == 0.5
    assert row("speed", "GB/s", ours=8.0, peers=peers, better="higher").ratio == 2.0


def test_a_goal_is_met_at_its_bound_and_missed_beyond_it():
    assert row("time", "s", ours=3.0, goal=Goal("<=", 3.0)).met is True
    assert row("time", "s", ours=3.1, goal=Goal("<=", 3.0)).met is False
    assert row("speed", "GB/s", ours=2.9, goal=Goal(">=", 3.0)).met is False
    assert row("time", "s", ours=3.0).met is None


def test_a_goal_on_the_ratio_is_missed_when_no_peer_was_measured():
    assert row("time", "s", ours=1.0, goal=Goal("<=", 1.0, of="ratio")).met is False


def test_results_are_a_list_of_rows_with_exactly_the_agreed_keys(tmp_path):
    path = write_results("sample", [row("time", "s", ours=1.0, peers={"one": 2.0})], tmp_path)
    (entry,) = json.loads(path.read_text())
    assert list(entry) == ["metric", "unit", "ours", "peers", "ratio", "goal", "met"]
    assert [path.name for path in tmp_path.iterdir()] == ["sample.json"]


def test_missed_rows_are_drawn_last():
    rows = [Row("missed", "s", 9.0, met=False), Row("met", "s", 1.0, met=True), Row("free", "s", 1.0)]
    console = Console(width=120, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(draw("sample", rows))
    text = capture.get()
    assert text.index("met ") < text.index("MISSED")
    assert text.index("free") < text.index("missed")


def test_an_unknown_benchmark_is_refused_with_the_names_of_the_known_ones():
    with pytest.raises(SystemExit, match="no benchmark nope; there are: pipeline"):
        choose(["nope"], ["pipeline"])
