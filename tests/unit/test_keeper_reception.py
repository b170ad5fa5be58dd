"""What a keeper makes of a client that asks for something else than it does: decided by values alone."""

from dataclasses import replace

from checkpoint.keeper.reception import Adopt, Guest, MakeWay, Refuse, receive_client
from checkpoint.keeper.settings import KeeperConfig
from checkpoint.lifecycle.policies import LatestN
from checkpoint.lifecycle.tiers import Tier

MINE = KeeperConfig("run", "h0", "/near")
PRUNING = replace(MINE, keep=(LatestN(2),))
OTHER = replace(MINE, run="other")


def test_the_settings_of_a_client_that_comes_alone_are_adopted_whatever_there_was():
    assert receive_client(MINE, PRUNING, [], 3) == Adopt()


def test_what_no_other_living_client_is_harmed_by_is_adopted_as_well():
    more = replace(MINE, arena_bytes=1 << 40, lease_s=1.0)
    assert receive_client(MINE, more, [Guest(7, MINE)], 3) == Adopt()
    assert receive_client(PRUNING, MINE, [Guest(7, MINE)], 0) == Adopt()


def test_a_client_that_contradicts_a_living_one_is_told_which_process_and_what_differs():
    refused = receive_client(MINE, PRUNING, [Guest(6, PRUNING), Guest(7, MINE)], 0)
    assert isinstance(refused, Refuse)
    assert "process 7" in refused.why and "keep is everything there and latest:2 here" in refused.why
    far = replace(MINE, far=(Tier("/far", name="far"),))
    refused = receive_client(MINE, far, [Guest(7, MINE)], 0)
    assert isinstance(refused, Refuse) and "far is no far tier there" in refused.why


def test_an_idle_keeper_makes_way_for_another_run_and_a_busy_one_says_what_it_is_busy_with():
    assert receive_client(MINE, OTHER, [], 0) == MakeWay()
    unsaved, used = receive_client(MINE, OTHER, [], 1), receive_client(MINE, OTHER, [Guest(7, MINE)], 0)
    assert isinstance(unsaved, Refuse) and "what that saved is not durable yet" in unsaved.why
    assert isinstance(used, Refuse) and "processes 7 use it" in used.why
