"""What goes over the keeper's socket comes out as it went in."""

import json
import os
import socket

import pytest

from checkpoint import Durable, Failed, KeeperConfig, KeeperLost, Skipped, StoreRefused
from checkpoint.engine.contract import Content, Handling, Slot, SnapshotPlan, Ticket
from checkpoint.engine.plan import TensorSpec
from checkpoint.format.codec import Codec
from checkpoint.format.layout import Box
from checkpoint.keeper import messages
from checkpoint.keeper.home import make_private


@pytest.fixture
def channels():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_plan_survives_the_wire():
    plan = SnapshotPlan(
        hosts=("a", "b"),
        content=Content((TensorSpec("w", "bfloat16", (3, 4)), TensorSpec("s", "float32", ())), "{}", "d"),
        meta={"spec_digest": "x"},
        handling=Handling(Codec.ZSTD, 3, "skip", 1.5),
        slots=(Slot(0, Box((1, 0), (2, 4)), 0, 16), Slot(1, Box((), ()), 64, 4)),
    )
    assert messages.plan_from_wire(json.loads(json.dumps(messages.plan_to_wire(plan)))) == plan


@pytest.mark.parametrize(
    "outcome", [Durable(1, 2, "store", 3, 0.5), Failed(1, 2, "because"), Skipped(1, 2, "full")]
)
def test_an_outcome_survives_the_wire(outcome):
    assert messages.outcome_from_wire(json.loads(json.dumps(messages.outcome_to_wire(outcome)))) == outcome


def test_a_ticket_survives_the_wire():
    ticket = Ticket("run", 1, 2, 3)
    assert messages.ticket_from_wire(messages.ticket_to_wire(ticket)) == ticket


def test_an_open_file_travels_with_a_message(channels):
    fd = os.memfd_create("x")
    messages.send(channels[0], {"a": 1}, [fd])
    message, received = messages.receive_with_fd(channels[1])
    assert message == {"a": 1} and received is not None
    os.write(fd, b"seen")
    assert os.pread(received, 4, 0) == b"seen"
    os.close(fd)
    os.close(received)


def test_the_other_side_s_end_is_one_error(channels):
    channels[0].close()
    with pytest.raises(KeeperLost):
        messages.receive(channels[1])
    with pytest.raises(KeeperLost):
        messages.receive_with_fd(channels[1])


def test_an_absurd_length_is_refused_before_memory_is_taken(channels):
    channels[0].sendall(b"\xff\xff\xff\xff")
    with pytest.raises(KeeperLost, match="none of the keeper's"):
        messages.receive(channels[1])


def test_a_memory_store_cannot_be_kept_by_another_process():
    with pytest.raises(StoreRefused, match="LocalHost"):
        _ = KeeperConfig("run", "h", "memory://x").home


def test_relative_and_absolute_paths_of_one_store_find_the_same_keeper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert KeeperConfig("run", "h", "store").home == KeeperConfig("run", "h", str(tmp_path / "store")).home


def test_a_directory_that_others_can_enter_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(KeeperLost, match=f"{shared} is open to other users"):
        make_private(shared)
    with pytest.raises(KeeperLost, match=f"{shared} is open to other users"):
        make_private(shared / "home")


@pytest.mark.parametrize("level", ["above", "above/home"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_stands_in_place_of_the_directory_is_refused(tmp_path, level, kind):
    (tmp_path / "theirs").mkdir(mode=0o700)
    place = tmp_path / level
    place.parent.mkdir(mode=0o700, exist_ok=True)
    match kind:
        case "link":
            place.symlink_to(tmp_path / "theirs")
        case "dangling link":
            place.symlink_to(tmp_path / "absent")
        case "file":
            place.touch(mode=0o600)
    with pytest.raises(KeeperLost, match=f"{place} is no directory"):
        make_private(tmp_path / "above" / "home")


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    home = tmp_path / "above" / "home"
    make_private(home)
    make_private(home)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(home).st_uid + 1)
    with pytest.raises(KeeperLost, match=f"{home.parent} belongs to another user"):
        make_private(home)
