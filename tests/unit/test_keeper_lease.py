"""A keeper's life is decided by arithmetic."""

from checkpoint.keeper.lease import Lease

FRESH = Lease(lease_s=60, flush_s=600, alone_since_s=0.0)


def test_a_keeper_that_nobody_ever_joined_ends_after_the_lease():
    assert not FRESH.is_over(59.9, num_unfinished=0)
    assert FRESH.is_over(60.0, num_unfinished=0)


def test_it_lives_as_long_as_it_has_a_client():
    lease = FRESH.joined().joined().left(10.0)
    assert not lease.is_over(1e9, num_unfinished=0)


def test_the_lease_begins_when_the_last_client_leaves():
    lease = FRESH.joined().joined().left(10.0).left(100.0)
    assert not lease.is_over(159.0, num_unfinished=0)
    assert lease.is_over(160.0, num_unfinished=0)


def test_a_client_that_comes_back_in_time_renews_it():
    lease = FRESH.joined().left(100.0).joined().left(150.0)
    assert not lease.is_over(200.0, num_unfinished=0)


def test_it_outlives_its_lease_while_something_is_to_be_flushed_but_not_for_ever():
    assert not FRESH.is_over(61.0, num_unfinished=1)
    assert not FRESH.is_over(659.0, num_unfinished=1)
    assert FRESH.is_over(660.0, num_unfinished=1)
