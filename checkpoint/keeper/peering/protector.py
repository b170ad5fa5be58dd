"""Protects what the hosts of a world hold by parity in each other's memory, one snapshot at a time.

The first host orders which: the newest that is due, once the one before is protected or given up. Every host
then offers its share, encodes the one stripe that falls to it, and says so to all. When all have, the
snapshot is protected, and only then older parity is let go. A thread of the keeper's does all of it; neither
captures nor stores ever wait for it, and a capture that finds no other room takes a protected one's.
"""

import logging
import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from checkpoint.engine.contract import OVERTAKEN, PARITY, Durable, Failed
from checkpoint.engine.ledger import SnapshotEntry, SnapshotId
from checkpoint.errors import CheckpointError, PeerLost
from checkpoint.keeper.peering.dialing import TcpPeers
from checkpoint.keeper.peering.fragments import Fragments, OwnPeers
from checkpoint.keeper.peering.marks import (
    Mark,
    mark_name,
    missing,
    name_of,
    newest_order,
    older_than,
    put_mark,
    voided_by,
)
from checkpoint.keeper.peering.policy import Parity
from checkpoint.keeper.peering.shelf import Shelf, Volume
from checkpoint.redundancy.groups import Group, form_groups
from checkpoint.redundancy.parity import forget, offer, protect
from checkpoint.redundancy.stripes import Stripes, prefix_of

log = logging.getLogger("holdfast.keeper")

_TICK_S = 0.1
_POLL_S = 0.02
_MAX_KEPT = 2  # besides the one under way: the last that is whole, and one of which that is not sure
_MAX_WHY = 500
_NICENESS = 5  # captures, packs and uploads go first


@dataclass(frozen=True, slots=True)
class Circle:
    """The hosts of one generation's world, the first rank's first, and the failure domain of each."""

    generation: int
    domains: dict[str, str]
    peers: TcpPeers

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts' names."""
        return tuple(self.domains)

    @property
    def leader(self) -> str:
        """The host that orders what is protected."""
        return self.hosts[0]


@dataclass(frozen=True, slots=True)
class _Task:
    """A snapshot to be protected: by which circle, in which stripes, and what this host has of it."""

    circle: Circle
    stripes: Stripes
    volume: Volume
    patience_s: float

    @property
    def id(self) -> SnapshotId:
        return self.volume.entry.id


class Protector:
    """One host's part in protecting its world's snapshots."""

    def __init__(self, host: str, shelf: Shelf, fragments: Fragments) -> None:
        """Protects nothing until it is told how (`parity`) and with whom (`meet`)."""
        self.parity: Parity | None = None
        self._host = host
        self._shelf = shelf
        self._fragments = fragments
        self._circle: Circle | None = None
        self._waiting: SnapshotEntry | None = None
        self._lock = threading.Lock()
        self._kept: dict[SnapshotId, _Task] = {}
        self._whole: SnapshotId | None = None
        self._last: SnapshotId = (0, -1)
        self._is_closed = False
        threading.Thread(target=self._keep_protecting, name="holdfast-parity", daemon=True).start()

    def meet(self, circle: Circle) -> None:
        """Learn which hosts there are. What an older generation's hosts say is no longer heard."""
        before = self._circle
        if before is None or circle.generation >= before.generation:
            self._circle = circle
            if before is not None:
                before.peers.close()

    def groups(self) -> dict[str, Any]:
        """Tell, by snapshot, the hosts of this one's parity group, its losses and its block size."""
        with self._lock:
            kept = {name_of(id_): task.stripes for id_, task in self._kept.items()}
        return {name: [one.group.hosts, one.group.num_parity, one.block_bytes] for name, one in kept.items()}

    def close(self) -> None:
        """Stop, after what is under way."""
        self._is_closed = True

    def _keep_protecting(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._is_closed:
            self._fragments.await_any(self._is_ordered, _TICK_S)
            circle, parity = self._circle, self.parity
            id_ = None if circle is None or parity is None else self._next(circle, parity)
            if circle is not None and parity is not None and id_ is not None:
                self._last = id_
                self._attempt(circle, parity, id_)

    def _attempt(self, circle: Circle, parity: Parity, id_: SnapshotId) -> None:
        began_s = time.monotonic()
        try:
            self._protect(self._begin(circle, parity, id_))
            log.info("step %d is protected by parity: %.2f s", id_[1], time.monotonic() - began_s)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                log.exception("parity of step %d", id_[1])  # the thread's border
            self._give_up(circle, id_, f"{type(error).__name__}: {error}")

    def _is_ordered(self, names: Collection[str]) -> bool:
        order = None if self._circle is None else newest_order(names, self._circle.leader)
        return order is not None and order > self._last

    def _next(self, circle: Circle, parity: Parity) -> SnapshotId | None:
        """Return what is to be protected now, if anything: as ordered, or to be ordered by this host."""
        due = self._find_due(circle, parity.every)
        if self._host == circle.leader:
            if due is None:
                return None
            name = mark_name(due.id, Mark.ORDERED, self._host)
            try:
                put_mark(self._peers(circle), circle.hosts, name)
            except PeerLost as error:
                self._last = due.id
                self._give_up(circle, due.id, str(error))
                return None
            return due.id
        order = newest_order(self._fragments.keys(""), circle.leader)
        is_new = order is not None and order > self._last and order[0] == circle.generation
        return order if is_new else None

    def _find_due(self, circle: Circle, every: int) -> SnapshotEntry | None:
        """Find the newest snapshot that is due, and keep it: the order for it may be on its way."""
        due = [
            entry
            for id_, entry in self._shelf.entries().items()
            if id_ > self._last and id_[0] == circle.generation and id_[1] % every == 0
        ]
        if not due:
            return None
        before, self._waiting = self._waiting, due[-1]
        if before is not self._waiting:
            self._shelf.intake.holding.guard(due[-1])
            self._let_go(before)
        return due[-1]

    def _let_go(self, entry: SnapshotEntry | None) -> None:
        if entry is not None and entry.id not in self._kept and entry is not self._waiting:
            self._shelf.intake.holding.unguard(entry)

    def _protect(self, task: _Task) -> None:
        """Do this host's part. Raises a CheckpointError, saying why, if the snapshot is not protected."""
        id_, circle, group = task.id, task.circle, task.stripes.group
        peers, name, host = self._peers(circle), name_of(task.id), self._host
        own = OwnPeers(host, self._fragments, circle.peers, task.volume)
        offer(own, task.stripes, host=host, snapshot=name, value=task.volume.value)
        put_mark(peers, group.hosts, mark_name(id_, Mark.OFFERED, host))
        self._await(task, Mark.OFFERED, group.hosts)
        protect(peers, task.stripes, host=host, snapshot=name)
        put_mark(peers, circle.hosts, mark_name(id_, Mark.DONE, host))
        try:
            self._await(task, Mark.DONE, circle.hosts)
        except PeerLost:
            if self._missing_anywhere(task):
                raise
        self._finish(task)

    def _begin(self, circle: Circle, parity: Parity, id_: SnapshotId) -> _Task:
        """Wait until this host holds the snapshot as well, and keep it from now on."""
        deadline = time.monotonic() + parity.patience_s
        while (volume := self._shelf.volume(id_)) is None:
            is_past = any(known > id_ for known in self._shelf.entries())
            if is_past:
                raise PeerLost(f"{OVERTAKEN}: {self._host} holds the snapshot of step {id_[1]} no longer")
            if time.monotonic() > deadline or self._circle is not circle or self._is_closed:
                raise PeerLost(f"{self._host} does not hold the snapshot of step {id_[1]}")
            time.sleep(_POLL_S)  # until this host has digested it as well
        task = _Task(circle, Stripes(self._group(circle, parity)), volume, parity.patience_s)
        self._shelf.intake.holding.guard(volume.entry)
        with self._lock:
            doubtful = sorted(known for known in self._kept if known != self._whole)
            self._kept[id_] = task
        for known in doubtful[: max(len(doubtful) + 1 - _MAX_KEPT, 0)]:
            self._drop(known)
        return task

    def _group(self, circle: Circle, parity: Parity) -> Group:
        grouping = form_groups(circle.domains, group_size=parity.group_size, num_parity=parity.losses)
        for group in grouping.groups:
            if self._host in group.hosts:
                return group
        raise PeerLost(
            f"{self._host} is in no parity group: {len(set(circle.domains.values()))} failure domains are "
            f"too few for {parity.losses} losses; add hosts elsewhere, or lower the losses"
        )

    def _await(self, task: _Task, mark: Mark, hosts: Collection[str]) -> None:
        """Wait for all hosts' marks. Raises PeerLost if one cannot go on, or none comes."""
        id_, deadline = task.id, time.monotonic() + task.patience_s

        def is_decided(names: Collection[str]) -> bool:
            return not missing(names, id_, mark, hosts) or voided_by(names, id_) is not None

        while not self._fragments.await_any(is_decided, _TICK_S):
            if self._circle is not task.circle or self._is_closed:
                raise PeerLost("the world has changed meanwhile")
            if time.monotonic() > deadline:
                late = missing(self._fragments.keys(""), id_, mark, hosts)
                raise PeerLost(f"{', '.join(late)} had not {mark} it after {task.patience_s:g} s")
        if missing(self._fragments.keys(""), id_, mark, hosts):
            raise PeerLost(self._why_void(id_))

    def _why_void(self, id_: SnapshotId) -> str:
        """Say what another host said when it could not go on with a snapshot; "" if none did."""
        gone = voided_by(self._fragments.keys(""), id_)
        if gone is None:
            return ""
        said = b"".join(self._fragments.fetch(mark_name(id_, Mark.VOID, gone)) or ())
        return f"{gone} could not go on: {said.decode(errors='replace')}"

    def _missing_anywhere(self, task: _Task) -> list[str]:
        """List the hosts whose word that they are done has reached nobody who can be asked."""
        names = set(self._fragments.keys(""))
        for host in task.circle.hosts:
            with suppress(PeerLost):
                names.update(self._peers(task.circle).keys(host, ""))
        return missing(names, task.id, Mark.DONE, task.circle.hosts)

    def _finish(self, task: _Task) -> None:
        """The snapshot is protected: let go what is older, and say so."""
        self._whole = task.id
        for known in [known for known in self._kept if known < task.id]:
            self._drop(known)
        for name in older_than(self._fragments.keys(""), task.id):
            self._fragments.drop(name)
        entry = task.volume.entry
        seconds = time.monotonic() - entry.started_s
        num_bytes = task.volume.value.num_bytes
        self._shelf.intake.board.tell(Durable(entry.step, entry.generation, PARITY, num_bytes, seconds))

    def _give_up(self, circle: Circle, id_: SnapshotId, why: str) -> None:
        """Say that a snapshot is not protected; what this host has not vouched for is of no use."""
        why = self._why_void(id_) or why  # the other's trouble is the cause of this one's
        level = logging.INFO if OVERTAKEN in why else logging.WARNING
        log.log(level, "step %d is not protected by parity: %s", id_[1], why)
        own_mark = mark_name(id_, Mark.DONE, self._host)
        if own_mark not in self._fragments.keys(own_mark):
            task = self._kept.get(id_)
            if task is not None:
                forget(self._peers(circle), task.stripes, snapshot=name_of(id_))
            self._drop(id_)
            for host in circle.hosts:
                with suppress(PeerLost):
                    void = mark_name(id_, Mark.VOID, self._host)
                    put_mark(self._peers(circle), [host], void, why[:_MAX_WHY])
        self._shelf.intake.board.tell(Failed(id_[1], id_[0], why, PARITY))

    def _drop(self, id_: SnapshotId) -> None:
        """Forget all that this host keeps of a snapshot."""
        self._fragments.drop(prefix_of(name_of(id_)))
        with self._lock:
            task = self._kept.pop(id_, None)
        if task is not None:
            self._let_go(task.volume.entry)

    def _peers(self, circle: Circle) -> OwnPeers:
        return OwnPeers(self._host, self._fragments, circle.peers)
