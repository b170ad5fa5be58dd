"""What members are told and what they tell: orders only get newer, and nothing is told twice."""

import logging
from dataclasses import replace

import pytest

from elastic.control.events import WorldBroken
from elastic.control.instructions import FormWorld, Manner
from elastic.runtime.lifeline import Anchor
from elastic.runtime.mailbox import Mailbox, Outbox, WorldOrder
from elastic.runtime.notices import LogLine
from elastic.runtime.world import Endpoint
from elastic.training.ports import Broken


def order(generation: int) -> WorldOrder:
    form = FormWorld(generation, ("w0",), ("h",), Manner.AT_ONCE, "test")
    return WorldOrder(form, Endpoint("127.0.0.1", 1), Anchor("127.0.0.1", 1, "token"))


def test_an_older_order_is_refused_and_a_newer_one_replaces_what_was_not_taken() -> None:
    mailbox = Mailbox(lease_s=60.0)
    assert mailbox.put(order(2))
    assert not mailbox.put(order(1))
    assert mailbox.put(order(3))
    taken = mailbox.next()
    assert taken is not None
    assert taken.form.generation == 3
    assert not mailbox.put(order(3)), "what was taken is known too"


def test_a_pending_order_is_proposed_at_the_next_boundary() -> None:
    mailbox = Mailbox(lease_s=60.0)
    mailbox.put(order(1))
    mailbox.next()
    assert mailbox.pending().next_generation == 0
    mailbox.put(order(2))
    assert mailbox.pending().next_generation == 2
    assert mailbox.has_newer()


def test_a_world_that_is_called_off_breaks_and_neither_a_newer_one_nor_a_polite_order_does() -> None:
    mailbox = Mailbox(lease_s=60.0)
    mailbox.check(1)
    assert mailbox.call_off(2)
    with pytest.raises(Broken, match="called off"):
        mailbox.check(1)
    mailbox.check(2)
    assert not mailbox.call_off(2), "it is known"
    assert not mailbox.call_off(1), "it is old"
    polite = WorldOrder(replace(order(3).form, manner=Manner.AT_BOUNDARY), order(3).endpoint, order(3).anchor)
    mailbox.put(polite)
    mailbox.check(2)


def test_a_stop_counts_for_its_generation_and_not_for_a_later_one() -> None:
    mailbox = Mailbox(lease_s=60.0)
    mailbox.put(order(4))
    mailbox.next()
    mailbox.stop(generation=3)
    assert not mailbox.pending().stop
    mailbox.stop(generation=4)
    assert mailbox.pending().stop


def test_without_a_driver_for_the_lease_a_member_stops_and_waits_for_no_order() -> None:
    mailbox = Mailbox(lease_s=0.0)
    mailbox.put(order(1))
    mailbox.next()
    assert mailbox.pending().stop
    assert mailbox.next() is None
    revived = Mailbox(lease_s=60.0)
    revived.hear()
    assert not revived.is_orphaned


def test_messages_come_out_once_and_in_order_with_log_records_between_them() -> None:
    outbox = Outbox("w0")
    outbox.put(WorldBroken("w0", 1, "first"))
    outbox.handle(logging.LogRecord("holdfast", logging.WARNING, "", 0, "second %d", (2,), None))
    taken = outbox.take(0.0)
    assert taken == [WorldBroken("w0", 1, "first"), LogLine("w0", logging.WARNING, "second 2")]
    assert outbox.take(0.0) == []
