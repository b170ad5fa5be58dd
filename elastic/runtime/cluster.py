"""A run's members on Ray: start them as named actors, hear them, end them."""

import gc
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.control.events import (
    Cause,
    Event,
    MemberLeaving,
    MemberLost,
    MemberReady,
    StacksKept,
    Tick,
    UserFailed,
)
from elastic.errors import JobRejected
from elastic.runtime.answers import Answers, living
from elastic.runtime.autopsies import Autopsies
from elastic.runtime.autopsy import examine
from elastic.runtime.joining import connect, own_address, runtime_env
from elastic.runtime.lifeline import Anchor, Lifelines
from elastic.runtime.local_ray import LocalRay
from elastic.runtime.notices import LogLine
from elastic.runtime.order import TrainOrder
from elastic.runtime.placement import HOST_LENGTH, Room, choose_room, list_rooms, strategy_for
from elastic.runtime.preemption import Draining
from elastic.runtime.worker import Assignment, Member

log = logging.getLogger("holdfast.cluster")
POLL_S = 0.2
AUTOPSY_S = 10.0
LISTEN_S = 0.1


News = Event | LogLine | StacksKept


class Actor(Member):
    """A member in a Ray actor: it learns from Ray on which node it runs."""

    def __init__(self, member: str, order: TrainOrder) -> None:
        # A local Ray's node has another id each time, but the host's keeper may still be there.
        is_local = order.cluster.address is None
        host = "local" if is_local else ray.get_runtime_context().get_node_id()[:HOST_LENGTH]
        super().__init__(Assignment(member, host, own_address(order), order))


@dataclass(frozen=True, slots=True)
class _CutOff:
    """A member whose lifeline ended."""

    member: str


@dataclass(slots=True)
class Seat:
    """A member's actor, the call that waits for its next news, what it last told, and its process."""

    actor: Any
    call: Any
    heard_at: float
    working_s: float = 0.0
    is_waiting: bool = False
    host: str = ""
    pid: int = 0


class Cluster:
    """The run's members on Ray.

    Actors are detached and named in the run's own namespace, so a later driver finds them. Without an address
    the run gets a local Ray. One thread waits for what members tell, another for the ends of their lifelines.
    """

    def __init__(self, order: TrainOrder) -> None:
        self._order = order
        self._seats: dict[str, Seat] = {}
        self._unheard: dict[str, Seat] = {}
        self._answers = Answers()
        self._seating = threading.Lock()
        self._news: SimpleQueue[News | _CutOff | Exception] = SimpleQueue()
        self._local = LocalRay(order) if order.cluster.address is None else None
        self._is_over = threading.Event()
        self._join()
        self._lifelines = Lifelines(self.address, lambda member: self._news.put(_CutOff(member)))

    def _join(self) -> None:
        """Join the cluster, and listen."""
        connect(
            self._order.cluster.address or (self._local.join_or_start() if self._local else ""), self._order
        )
        # Once: each anew would be sent to Ray again, in a recovery's midst.
        self._actor: Any = ray.remote(Actor)
        self._autopsies = Autopsies()
        self._draining = Draining() if self._order.cluster.address is not None else None
        self._is_over.clear()
        self._listener = threading.Thread(target=self._listen, name="listen", daemon=True)
        self._listener.start()

    def _part(self) -> None:
        """Listen no more, and leave the cluster.

        Whichever thread drops a reference to an object while Ray shuts down ends the whole process, without a
        word: so none may be left by then, also not in the cycles of errors and their tracebacks.
        """
        self._autopsies.close()
        self._is_over.set()
        self._listener.join()
        self._seats.clear()
        self._unheard.clear()
        gc.collect()
        ray.shutdown()

    @property
    def address(self) -> str:
        """The driver's own network address, where members can reach it."""
        return own_address(self._order)

    @property
    def anchor(self) -> Anchor:
        """Where members hold their lifelines."""
        return self._lifelines.anchor

    def find(self) -> list[str]:
        """Return the living members that an earlier driver of this run left, and greet them."""
        found = dict(living(map(str, ray.util.list_named_actors()), ray.get_actor))
        for name, actor in found.items():
            actor.greet.remote()
            self._seat(name, actor)
        return list(found)

    def start(self, member: str) -> None:
        """Start a member's process. Whether it came up is heard from its first news."""
        cluster, room = self._order.cluster, self._choose_room()
        actor = self._actor.options(
            name=member,
            lifetime="detached",
            max_concurrency=8,
            max_restarts=0,
            # A local Ray is the run's own: counting its cores would only keep the run from growing.
            num_cpus=cluster.threads_per_worker if cluster.address else 0,
            num_gpus=cluster.gpus_per_worker,
            scheduling_strategy=strategy_for(room),
            runtime_env=runtime_env(self._order),
        ).remote(member, self._order)
        self._seat(member, actor, room.node[:HOST_LENGTH] if room else "")

    def _choose_room(self) -> Room | None:
        """Choose the node that a member starts on; None: Ray chooses."""
        cluster = self._order.cluster
        if self._draining is None:
            return None
        with self._seating:
            seats = list(self._seats.values())
        try:
            rooms = list_rooms(
                [seat.host for seat in seats],
                [seat.host for seat in seats if not seat.pid],
                self._draining.hosts,
            )
        except RayError as error:
            log.warning("the cluster's nodes are not known for now, Ray places the next worker: %s", error)
            return None
        return choose_room(rooms, {"CPU": cluster.threads_per_worker, "GPU": cluster.gpus_per_worker})

    def tell(self, member: str, method: str, *arguments: object) -> None:
        """Call a member without waiting; one that is gone is heard of as lost."""
        seat = self._seats.get(member)
        if seat is not None:
            getattr(seat.actor, method).remote(*arguments)

    def hear(self, timeout_s: float) -> Iterator[News]:
        """Yield what members tell, and that members are lost, waiting `timeout_s` for something."""
        try:
            message = self._news.get(timeout=timeout_s)
            while True:
                yield from self._understood(message)
                message = self._news.get_nowait()
        except Empty:
            return

    def tick(self) -> Tick:
        """Tell how long ago each member answered last, and how long each is at its micro-batch."""
        now = time.monotonic()
        with self._seating:
            return Tick(
                {member: now - seat.heard_at for member, seat in self._seats.items()},
                {member: seat.working_s for member, seat in self._seats.items()},
                frozenset(member for member, seat in self._seats.items() if seat.is_waiting),
            )

    def kill(self, member: str) -> None:
        """End a member's process."""
        seat = self._unseat(member) or self._unheard.pop(member, None)
        if seat is not None:
            ray.kill(seat.actor)

    def may_live(self, member: str) -> bool:
        """Whether the process of a lost member may be there all the same: it only is not heard any more."""
        return member in self._unheard

    def end_silent(self, member: str) -> None:
        """End a member that does not answer, once it is written down what it was doing."""
        seat = self._unseat(member) or self._unheard.pop(member, None)
        if seat is not None:
            self._autopsies.begin(partial(self._examine, member, seat), partial(ray.kill, seat.actor))

    def _examine(self, member: str, seat: Seat) -> None:
        try:
            if seat.pid:
                file = self._order.run_dir / "stacks" / f"{member}.txt"
                file.parent.mkdir(exist_ok=True)
                file.write_text(self._found_in(member, seat))
                self._news.put(StacksKept(member, f"stacks/{file.name}"))
        except (OSError, RayError) as error:
            log.warning("what %s was doing is not known: %s", member, error)

    def _found_in(self, member: str, seat: Seat) -> str:
        """Examine a process where it runs."""
        if self._local is not None:
            return examine(member, seat.pid)
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
        living = (one["NodeID"] for one in nodes if one["Alive"])
        node = next((one for one in living if one.startswith(seat.host)), None)
        if node is None:
            return f"{member}: its node {seat.host} is gone"
        examined = ray.remote(examine).options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        return str(ray.get(examined.remote(member, seat.pid), timeout=AUTOPSY_S))

    def renew(self) -> None:
        """Keep the local Ray, if there is one, alive for another lease."""
        if self._local is not None:
            self._local.renew()

    def revive(self) -> None:
        """Start another local Ray where it died: not while members are told what to do, who die with it."""
        if self._local is None or not self._local.is_dead():
            return
        log.warning("the local Ray died; starting another")
        with self._seating:
            pids = {member: seat.pid for member, seat in self._seats.items()}
        self._part()
        self._join()
        for member, pid in pids.items():
            if pid:
                self._news.put(MemberLost(member, Cause.HOST_DIED, "the local Ray died"))
            else:
                self.start(member)  # it was to be started when Ray died

    def detach(self) -> None:
        """Let go of the run without ending anything; the workers and the local Ray have their lease."""
        self._autopsies.call_off()
        self._lifelines.close()
        self._part()
        if self._local is not None:
            self._local.detach()

    def end(self) -> None:
        """End all members, and the local Ray if there is one."""
        for member in list(self._seats):
            self.kill(member)
        self._lifelines.close()
        self._part()
        if self._local is not None:
            self._local.end()

    def _seat(self, member: str, actor: Any, host: str = "") -> None:
        with self._seating:
            self._seats[member] = Seat(actor, actor.poll.remote(POLL_S), time.monotonic(), host=host)

    def _unseat(self, member: str) -> Seat | None:
        with self._seating:
            return self._seats.pop(member, None)

    def _understood(self, message: News | _CutOff | Exception) -> Iterator[News]:
        match message:
            case Exception():
                raise message
            case _CutOff(member) if (seat := self._unseat(member)) is not None:
                self._unheard[member] = seat
                yield MemberLost(member, Cause.PROCESS_DIED, "its connection to the driver ended")
            case _CutOff():
                return  # it was known
            case MemberReady(member, host, pid):
                if (seat := self._seats.get(member)) is not None:
                    seat.host, seat.pid = host, pid
                yield message
                if self._draining is not None and (notice := self._draining.notice(host)) is not None:
                    yield MemberLeaving(member, notice)  # when that was news, its host was not known yet
            case _:
                yield message

    def _listen(self) -> None:
        try:
            while not self._is_over.is_set():
                self._tell_of_draining()
                with self._seating:
                    calls = {seat.call: member for member, seat in self._seats.items()}
                if not calls:
                    self._is_over.wait(LISTEN_S)
                    continue
                done, _ = ray.wait(list(calls), num_returns=1, timeout=LISTEN_S)
                more, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
                for call in dict.fromkeys([*done, *more]):
                    self._read(calls[call], call)
        except Exception as error:  # noqa: BLE001  (the thread's border: the driver's loop raises it)
            self._news.put(error)

    def _tell_of_draining(self) -> None:
        for host, notice in self._draining.news().items() if self._draining else ():
            with self._seating:
                members = [member for member, seat in self._seats.items() if seat.host == host]
            for member in members:
                self._news.put(MemberLeaving(member, notice))

    def _read(self, member: str, call: Any) -> None:
        answer = self._answers.take(member, lambda: ray.get(call))
        if answer is None:
            self._is_over.wait(LISTEN_S)  # the next call may fail at once, too
            self._ask_again(member)
            return
        if isinstance(answer, MemberLost | UserFailed):
            if (seat := self._unseat(member)) is not None:
                self._unheard[member] = seat
                self._news.put(answer)
            return
        with self._seating:
            seat = self._seats.get(member)
            if seat is not None:
                seat.heard_at = time.monotonic()
                seat.working_s, seat.is_waiting = answer.working_s, answer.is_waiting
        self._ask_again(member)
        for message in answer.news:
            self._news.put(message)

    def _ask_again(self, member: str) -> None:
        with self._seating:
            seat = self._seats.get(member)
            if seat is not None:
                seat.call = seat.actor.poll.remote(POLL_S)


def check_portable(order: TrainOrder) -> None:
    """Raise JobRejected if an order cannot travel to a worker's process."""
    for name, value in order.job.settings.items():
        try:
            ray.cloudpickle.dumps(value)  # type: ignore[no-untyped-call]  # Ray has no types here
        except Exception as error:  # the border to the user's objects: their __reduce__ may raise anything
            raise JobRejected(
                f"job.settings.{name} cannot travel to a worker: {type(error).__name__}: {error}; "
                "settings are plain data, make what they describe in the job"
            ) from error
