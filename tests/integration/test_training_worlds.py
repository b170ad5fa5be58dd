"""Training in real worlds of real processes: whoever takes part, dies or joins, the bits are the same."""

import pytest

from tests.integration.training_stage import NUM_STEPS, Chapter, Diary, Props, perform

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

QUIET = {f"a world of {size}": [Chapter(tuple(range(size)))] for size in range(1, 6)}
CHURN = [
    Chapter((0, 1, 2, 3), victim=3, dies_at=2, phase="leaf"),
    Chapter((0, 1, 2), victim=1, dies_at=4, phase="exchange"),
    Chapter((0, 2), until=6),
    Chapter((0, 2, 4, 5), victim=5, dies_at=7, phase="agreement"),
    Chapter((0, 2, 4), victim=0, dies_at=9, phase="agreed"),
    Chapter((2, 4, 6), victim=2, dies_at=9, phase="send"),
    Chapter((4, 6), victim=6, dies_at=11, phase="all_gather"),
    Chapter((4,)),
]


SLOW = [Chapter((0, 1, 2, 3), slow=1)]
FLIP = [Chapter((0, 1, 2), flipped=1, flips_at=3)]
# Rank 0, who would give its state to the newcomer, is corrupt by then.
JOIN = [Chapter((0, 1, 2), until=6), Chapter((0, 1, 2, 3), spoiled=0)]
# A rank dies in the comparison that would have found the flipped bit.
CUT_SHORT = [
    Chapter((0, 1, 2, 7), victim=7, dies_at=5, phase="compare", flipped=1, flips_at=4),
    Chapter((0, 1, 2)),
]


@pytest.fixture(scope="module")
def performed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Diary]]:
    text = tmp_path_factory.mktemp("data") / "text"
    text.write_text("".join(f"{number} is followed by {number + 1}.\n" for number in range(4000)))
    return perform(
        {**QUIET, "slow": SLOW, "flip": FLIP, "join": JOIN, "cut short": CUT_SHORT, "churn": CHURN},
        Props(str(text)),
    )


def test_worlds_of_every_size_and_a_world_that_loses_and_gains_members_end_with_the_same_bits(performed):
    finished = {
        name: {diary.sha256 for diary in diaries.values()} - {""} for name, diaries in performed.items()
    }
    assert all(len(hashes) == 1 for hashes in finished.values()), finished
    assert len(set.union(*finished.values())) == 1, finished


def test_every_committed_step_has_the_same_loss_in_every_world_and_none_is_committed_twice(performed):
    expected = performed["a world of 1"][0].steps
    assert [step for step, _ in expected] == list(range(1, NUM_STEPS + 1))
    for name, diaries in performed.items():
        for member, diary in diaries.items():
            assert set(diary.steps) <= set(expected), (name, member)
            assert len({step for step, _ in diary.steps}) == len(diary.steps), (name, member)


def test_survivors_keep_their_state_and_joiners_get_theirs_from_a_peer(performed):
    assert performed["churn"][4].sources == ["peer", "self", "self", "self", "self"]
    assert [step for step, _ in performed["churn"][4].steps] == list(range(7, NUM_STEPS + 1))
    assert all(diary.sources[0] == "fresh" for diary in performed["a world of 5"].values() if diary.sources)


def test_a_slow_member_computes_less_than_the_others_and_the_bits_stay_the_same(performed):
    computed = {member: diary.num_losses for member, diary in performed["slow"].items() if diary.num_losses}
    assert sum(computed.values()) == 8 * NUM_STEPS
    assert computed[1] < 0.8 * 2 * NUM_STEPS, computed
    assert {diary.sha256 for diary in performed["slow"].values()} - {""} == {
        performed["a world of 1"][0].sha256
    }


def test_a_bit_that_flips_in_one_replica_is_found_named_and_healed_by_the_majority(performed):
    assert performed["flip"][1].healed == [(4, ("model/blocks.0.up.weight",))]
    assert performed["flip"][0].healed == performed["flip"][2].healed == []
    told = {name for name, diaries in performed.items() if any(each.healed for each in diaries.values())}
    assert told == {"flip", "join", "cut short"}


def test_a_newcomer_is_given_nothing_by_a_corrupt_member_that_the_others_outvote(performed):
    assert performed["join"][0].healed == [(6, ("model/blocks.0.up.weight",))]
    assert performed["join"][3].sources == ["peer"]
    assert performed["join"][3].healed == []


def test_a_comparison_that_a_death_cut_short_is_made_before_anything_else(performed):
    assert performed["cut short"][1].healed == [(5, ("model/blocks.0.up.weight",))]
