"""The checkpoint benchmark measures what it says: turns rotate, states are told apart, engines are proved."""

from functools import partial

import pytest
import torch

from tests.bench.figures.chosen import choose
from tests.bench.figures.picture import draw_picture
from tests.bench.figures.session import CONTROL, OURS, PEERS, rounds, session
from tests.bench.harness import row
from tests.bench.peers.training import Step, digest, make_state


def test_every_round_gives_each_a_turn_and_begins_with_the_next():
    seen: list[str] = []
    rounds(4, [partial(seen.append, name) for name in "abc"])
    assert "".join(seen) == "abcbcacababc"


def test_the_digest_tells_states_apart_by_any_bit_and_any_place():
    state = make_state(1 << 20, 3, "cpu")
    expected = digest(state)
    assert digest(dict(reversed(state.items()))) == expected
    for name, tensor in state.items():
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            words = tensor.view(-1).view(torch.int32)
            words[place] ^= 1
            assert digest(state) != expected, (name, place)
            words[place] ^= 1
    words = state[min(state)].view(-1)
    for one, other in ((0, 1), (0, 4096), (words.numel() - 2, words.numel() - 1)):
        words[[one, other]] = words[[other, one]]
        assert digest(state) != expected, (one, other)
        words[[one, other]] = words[[other, one]]
    first, second, *_ = state
    assert digest({**state, first: state[second], second: state[first]}) != expected


def test_an_update_changes_every_tensor():
    state = make_state(1 << 16, 4, "cpu")
    before = {name: tensor.clone() for name, tensor in state.items()}
    Step("cpu").update(state)
    assert sum(tensor.nbytes for tensor in state.values()) == 1 << 16
    assert not any(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_figures_are_chosen_by_name_and_an_unknown_name_is_refused():
    figures = ["blocked", "codec", "index"]
    assert choose("", figures) == figures
    assert choose("codec,index", figures) == ["codec", "index"]
    with pytest.raises(ValueError, match="no figure nope; there are: blocked, "):
        choose("codec,nope", figures)


def test_the_picture_shows_every_size_that_was_measured(tmp_path):
    rows = [
        row(f"{size}: {metric}", "", ours=2.0, peers={PEERS[0]: 3.0})
        for size in ("0.5 GiB", "2 GiB")
        for metric in (
            "blocked per checkpoint, saving every step",
            "save to durable, raw codec",
            "restore from a warm page cache",
        )
    ]
    draw_picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_our_engines_and_the_control_restore_what_was_saved_before_it_changed():
    with session() as workers:
        for lane in workers.lanes(1 << 20, 8, (OURS, "holdfast, codec", CONTROL)):
            trained = lane.ask("train", num_steps=3, every=1, num_products=1)
            assert len(trained["blocked"]) == 3
            assert lane.ask("restore")["is_equal"], lane.engine
            assert lane.ask("persist") > 0
            lane.ask("drop")
        workers.ours.ask("train", engine=OURS, num_steps=1, every=1, num_products=1)
        workers.ours.ask("train", engine=CONTROL, num_steps=1, every=2, num_products=1)
        workers.close()
