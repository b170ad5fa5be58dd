"""A world: the process groups of one generation, and the ways out of them when they break.

gloo never tells everybody that a peer died: only the victim's neighbours get an error, the others wait for
the group's timeout, and its abort does nothing. So a world knows its own sockets (by the ports its members
listen on) and shuts them down itself, which frees a blocked thread at once and cascades to the peers.
"""

import gc
import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from elastic.runtime.doors import Door, find_closed
from elastic.runtime.lane import Lane, StreamLane, ThreadLane
from elastic.runtime.reach import freed, reach
from elastic.runtime.sockets import Address, keep_private, listening, shut
from elastic.training.ports import Broken

CONNECT_TIMEOUT = timedelta(seconds=5)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # longer than the driver waits for what holds up everybody
ABORT_TIMEOUT_S = 10.0
POLL_S = 0.002
_OPS: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the driver's rendezvous store listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Place:
    """A member's place in a world: `rank` of `hosts`, whose length is the world's size; `address` is its own
    network address.
    """

    generation: int
    rank: int
    hosts: tuple[str, ...]
    address: str


class Unconnected(Broken):
    """The members did not connect: this one could not reach the `unreachable` ranks (None: it stopped
    looking, as a newer world was ordered).
    """

    def __init__(self, generation: int, why: str, unreachable: tuple[int, ...] | None) -> None:
        super().__init__(generation, why)
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the members of a world listen: for each other's collectives, and behind their doors, by rank."""

    listeners: frozenset[Address]
    doors: dict[int, Address]


class World:
    """The collectives of one generation. Every method raises Broken when the world is over.

    CPU tensors travel over gloo, CUDA tensors over nccl.
    """

    def __init__(
        self, place: Place, groups: dict[str, Any], listeners: frozenset[Address], lane: Lane
    ) -> None:
        self.generation, self.rank, self.hosts = place.generation, place.rank, place.hosts
        self.size = len(place.hosts)
        self._groups = groups
        self._listeners = listeners
        self._lane = lane
        self._cutting = threading.Lock()
        self._is_left = False

    def exchange(self, send: Sequence[torch.Tensor | None], receive: Sequence[torch.Tensor | None]) -> None:
        """Swap tensors with every other rank; index is the peer, None means nothing."""
        received = [(peer, each) for peer, each in enumerate(receive) if each is not None and each.numel()]
        sent = [(peer, each) for peer, each in enumerate(send) if each is not None and each.numel()]
        if not received and not sent:
            return
        (_, any_of_them), *_ = *received, *sent
        # nccl queues the calls: a send behind a receive that waits for the peer's own would wait for ever.
        is_joint = any_of_them.device.type == "cuda"
        if is_joint:
            self._call(lambda group, *_: group._start_coalescing(), any_of_them, None)
        posted = [
            *(self._call(lambda group, t, p: group.recv([t], p, 0), each, peer) for peer, each in received),
            *(self._call(lambda group, t, p: group.send([t], p, 0), each, peer) for peer, each in sent),
        ]
        if is_joint:
            posted = [self._call(lambda group, *_: group._end_coalescing(), any_of_them, None)]
        for work in posted:
            self._wait_for_peer(work, any_of_them)

    def all_gather(self, out: torch.Tensor, mine: torch.Tensor) -> None:
        """Gather equal slices of all ranks into `out`, in rank order."""
        self._wait(self._call(lambda group, t, o: group._allgather_base(o, t), mine, out))

    def all_reduce(self, tensor: torch.Tensor, op: Literal["sum", "max"]) -> None:
        """Reduce in place over all ranks."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        self._wait(self._call(lambda group, t, o: group.allreduce([t], o), tensor, options))

    def beside(self, work: Callable[[], None]) -> None:
        """Run work that uses this world's collectives beside the caller, one after another."""
        self._lane.start(work)

    def join(self) -> None:
        """Wait until all work beside is done."""
        self._lane.join()

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor to a rank that receives it."""
        self._wait_for_peer(self._call(lambda group, t, p: group.send([t], p, 1), tensor, to), tensor)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Receive a tensor of the sent shape and dtype."""
        self._wait_for_peer(self._call(lambda group, t, p: group.recv([t], p, 1), tensor, source), tensor)

    def cut(self) -> None:
        """Break this world from any thread: whoever is blocked in it, here or elsewhere, gets Broken.

        Does nothing once this member has left it: a newer world's connections go to the same listeners.
        """
        with self._cutting:
            if not self._is_left:
                shut(self._listeners)

    def leave(self) -> None:
        """Drop the groups, so that their sockets close and peers that still wait are freed.

        Raises TimeoutError if the device does not let go of them: nothing else can run there then.
        """
        if self.size > 1:
            self.cut()
        with self._cutting:
            self._is_left = True
        groups, self._groups = self._groups, {}
        try:
            if (on_device := groups.pop("cuda", None)) is not None:
                _abort(on_device, self.generation)
            self._lane.close()
        finally:
            del groups
            gc.collect()

    def _call(self, start: Callable[..., dist.Work], tensor: torch.Tensor, argument: object) -> dist.Work:
        group = self._groups.get(tensor.device.type)
        if group is None:
            raise Broken(self.generation, "this member has left the world")
        try:
            return start(group, tensor, argument)
        except RuntimeError as error:
            raise Broken(self.generation, _first_line(error)) from None

    def _wait_for_peer(self, work: dist.Work, tensor: torch.Tensor) -> None:
        """Wait for a transfer from one rank to another.

        gloo's keep the timeout of connecting if they are told no other; nccl's would block the host with one.
        """
        self._wait(work, COLLECTIVE_TIMEOUT if tensor.device.type == "cpu" else timedelta(0))

    def _wait(self, work: dist.Work, timeout: timedelta = timedelta(0)) -> None:
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise Broken(self.generation, _first_line(error)) from None


class Former:
    """Forms worlds for one member.

    It keeps one gloo device (a listening socket), and a door, for the member's whole life.
    """

    def __init__(self, address: str, device: torch.device) -> None:
        self._address, self._device = address, device
        before = listening()
        self._gloo = dist.ProcessGroupGloo.create_device(hostname=address)
        self._listeners = listening() - before
        self._door = Door(address)
        keep_private(self, {*self._listeners, self._door.address})

    def form(
        self, place: Place, endpoint: Endpoint, is_wanted: Callable[[], bool], wait: Callable[[float], None]
    ) -> World:
        """Meet the other members at the rendezvous store, then connect.

        `is_wanted`, which is asked from another thread too, turns false when a newer world has been ordered;
        `wait` sleeps. Raises Broken when this one can't form: `Unconnected` if its members met, and did not
        connect.
        """
        self._door.clear()
        address = (endpoint.host, endpoint.port)
        try:
            with freed(address, is_wanted):
                found = reach(address, is_wanted, wait)
                store = PrefixStore(f"generation-{place.generation}", found)
                meeting = self._meet(store, place, is_wanted, wait)
        except (RuntimeError, ConnectionError) as error:
            raise Broken(place.generation, f"could not form: {_first_line(error)}") from None
        try:
            lane = StreamLane(self._device) if self._device.type == "cuda" else ThreadLane()
            with freed(address, is_wanted):
                groups = self._connect(store, place)
            keep_private(self, meeting.listeners | {self._door.address, address})
            return World(place, groups, meeting.listeners, lane)
        except RuntimeError as error:
            why = f"could not form: {_first_line(error)}"
        raise Unconnected(place.generation, why, find_closed(meeting.doors, is_wanted))

    def _meet(
        self, store: Store, place: Place, is_wanted: Callable[[], bool], wait: Callable[[float], None]
    ) -> Meeting:
        """Wait until every rank has told where it listens; return all these addresses.

        The wait polls, because a blocked store call could not be called off when a member dies meanwhile.
        """
        keys = [f"listens-{rank}" for rank in range(len(place.hosts))]
        store.set(keys[place.rank], json.dumps([sorted(self._listeners), self._door.address]))
        while not store.check(keys):
            if not is_wanted():
                raise Broken(place.generation, "a newer world was ordered while this one formed")
            wait(POLL_S)
        told = [json.loads(store.get(key)) for key in keys]
        listeners = frozenset((host, port) for addresses, _ in told for host, port in addresses)
        return Meeting(
            listeners,
            {rank: (host, port) for rank, (_, (host, port)) in enumerate(told) if rank != place.rank},
        )

    def _connect(self, store: Store, place: Place) -> dict[str, Any]:
        size = len(place.hosts)
        gloo_class: Any = dist.ProcessGroupGloo  # its options are not in torch's type stubs
        options = gloo_class._Options()
        options._devices = [self._gloo]
        options._timeout = CONNECT_TIMEOUT
        gloo = gloo_class(PrefixStore("gloo", store), place.rank, size, options)
        gloo._set_default_timeout(COLLECTIVE_TIMEOUT)
        groups: dict[str, Any] = {"cpu": gloo}
        if self._device.type == "cuda":
            on_device = dist.ProcessGroupNCCL.Options()
            on_device._timeout = COLLECTIVE_TIMEOUT
            groups["cuda"] = dist.ProcessGroupNCCL(PrefixStore("nccl", store), place.rank, size, on_device)
        return groups


def open_rendezvous(host: str) -> tuple[TCPStore, Endpoint]:
    """Open a rendezvous store that listens on one address only; it lives as long as the returned object."""
    listener = socket.create_server((host, 0), backlog=1024)
    port = int(listener.getsockname()[1])
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, Endpoint(host, port)


def _abort(group: Any, generation: int) -> None:
    """Abort a communicator, which waits for the device without an end of its own: a broken one may hang."""
    thread = threading.Thread(target=group.abort, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_TIMEOUT_S)
    if thread.is_alive():
        raise TimeoutError(
            f"the device's communicator of world {generation} has not aborted within {ABORT_TIMEOUT_S:g} s: "
            "this process cannot use the device any more"
        )


def _first_line(error: BaseException) -> str:
    """Take gloo's first line without the place in its source and its general advice."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split("] ", 1)[-1].split(" This is typically")[0][:300]
