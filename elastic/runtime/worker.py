"""A member's life: build the trainer, then form worlds as told, train in them, and leave them when they
break.

The training runs in a thread of its own; the member's methods are called by the driver, from other threads.
"""

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from checkpoint import (
    KeeperConfig,
    Loaded,
    Saver,
    StoreSource,
    connect,
    load,
    open_store,
    set_aside,
)
from elastic.control.events import (
    Ending,
    MemberBuilding,
    MemberCame,
    MemberEnded,
    MemberLeaving,
    MemberReady,
    Settled,
    WorldBroken,
    WorldCalledOff,
    WorldFormed,
)
from elastic.control.instructions import FormWorld, Manner, StopWorld
from elastic.control.standing import BLANK
from elastic.runtime import autopsy
from elastic.runtime.alone import Survivor, keep_ray, save_alone
from elastic.runtime.failures import Failures
from elastic.runtime.lifeline import Lifeline
from elastic.runtime.mailbox import Mailbox, Outbox, WorldOrder
from elastic.runtime.notices import Answer
from elastic.runtime.order import TrainOrder
from elastic.runtime.peers import Home, Neighbours
from elastic.runtime.preemption import heed_sigterm
from elastic.runtime.warden import LEASE
from elastic.runtime.world import Former, Place, Unconnected, World
from elastic.training.job import load_job, load_settings
from elastic.training.plan import TrainPlan
from elastic.training.ports import Broken
from elastic.training.trainer import Storage, Trainer

log = logging.getLogger("holdfast.worker")
IDLE_LEASE_S = 10.0  # of a keeper without workers that holds nothing: enough for a replaced one to find it


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a member is told when it starts: its name, its host, its own network address, and the run."""

    member: str
    host: str
    address: str
    order: TrainOrder


class Member:
    """One process that may become a rank.

    Made by the cluster; its methods are the driver's side of the conversation.
    """

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._mailbox = Mailbox(assignment.order.lease_s)
        self._outbox = Outbox(assignment.member)
        self._world: World | None = None
        self._ready: MemberReady | None = None
        self._neighbours: Neighbours | None = None
        self._trainer: Trainer | None = None
        self._lifeline = Lifeline(assignment.member)
        logging.getLogger("holdfast").addHandler(self._outbox)
        logging.getLogger("holdfast").setLevel(logging.INFO)
        autopsy.prepare()
        self._came_to = 0  # the newest world
        self._notice: MemberLeaving | None = None
        self._failures = Failures(assignment.member, self._outbox.put)
        heed_sigterm(self._take_notice)
        threading.Thread(target=self._live, name="training", daemon=True).start()

    def poll(self, timeout_s: float) -> Answer:
        """Return what happened since the last poll; the call itself renews the lease."""
        self._mailbox.hear()
        news = tuple(self._outbox.take(timeout_s))
        if (trainer := self._trainer) is None:
            return Answer(news)
        return Answer(news, *trainer.activity)

    def greet(self) -> None:
        """Introduce this member to a new driver."""
        self._mailbox.hear()
        if self._ready is not None and self._trainer is not None:
            step, generation = self._trainer.standing.committed, self._mailbox.newest
            self._outbox.put(replace(self._ready, step=step, generation=generation))
        else:
            self._outbox.put(MemberBuilding(self._assignment.member))
        if self._notice is not None:
            self._outbox.put(self._notice)
        self._failures.tell_again()

    def form(self, order: WorldOrder) -> None:
        """Take an order to form a world; an order at once also breaks the world the member is in."""
        form = order.form
        if self._mailbox.put(order):
            if form.manner is Manner.AT_ONCE:
                self.leave(form.generation)
        elif form.generation == self._came_to:  # the driver has not heard of it
            self._outbox.put(MemberCame(self._assignment.member, form.generation))

    def leave(self, generation: int) -> None:
        """Break the world the member is in, if it is older than this generation, which is to form at once."""
        is_new, world = self._mailbox.call_off(generation), self._world
        if world is not None and world.generation < generation:
            if is_new:
                self._outbox.put(WorldCalledOff(self._assignment.member, world.generation))
            world.cut()

    def stop(self, instruction: StopWorld) -> None:
        """Take the request for a clean end."""
        self._mailbox.stop(instruction.generation)

    def die(self) -> None:
        """Be SIGKILLed, for a drill."""
        os.kill(os.getpid(), signal.SIGKILL)

    def _take_notice(self) -> None:
        self._notice = MemberLeaving(self._assignment.member, "it was sent SIGTERM")
        self._outbox.put(self._notice)

    def _live(self) -> None:
        torch.set_num_threads(self._assignment.order.cluster.threads_per_worker)
        self._train_or_tell()
        while self._mailbox.next() is not None:
            self._failures.tell_again()  # no world can have this worker: who orders one has not heard of it
        os._exit(0)  # nothing outlives its lease

    def _train_or_tell(self) -> None:
        """Train until the lease ends; tell the driver what went wrong otherwise."""
        try:
            self._train_until_told()
        except BaseException as error:  # noqa: BLE001  (the border: what is not told would look like a hang)
            self._failures.tell(error)

    def _train_until_told(self) -> None:
        assignment = self._assignment
        device = _device(assignment.order)
        former = Former(assignment.address, device)
        keeper = connect(_keeper(assignment))
        saver = Saver(keeper, assignment.order.run, assignment.order.checkpoint.save)
        parity = assignment.order.checkpoint.parity
        self._neighbours = Neighbours(keeper, Home(assignment.host, assignment.address, parity))
        trainer = self._trainer = _trainer(assignment, saver, device, self._neighbours)
        lease, save_s = assignment.order.run_dir / "ray" / LEASE, assignment.order.world.save_s
        keep_ray(lease, lambda: self._mailbox.is_orphaned, save_s)
        gc.collect()
        gc.freeze()  # what lives by now lives on: searching the rest for cycles takes milliseconds
        self._ready = MemberReady(assignment.member, assignment.host, os.getpid())
        self._outbox.put(self._ready)
        while True:
            while (order := self._mailbox.next()) is not None:
                if self._failures.may_serve(order.form):
                    self._serve_or_tell(order, former, trainer)
                if self._mailbox.is_orphaned:
                    break
            self._save_alone(trainer)
            if self._mailbox.is_orphaned:  # else a driver came after all
                saver.close()
                os._exit(0)

    def _save_alone(self, trainer: Trainer) -> None:
        """Save what no world is left to save: the driver died, then a member, before the lease ran out."""
        assignment = self._assignment
        log.warning(
            "no driver for %.0f s: this worker saves what it holds, and ends", assignment.order.lease_s
        )
        if not trainer.is_whole:
            return  # what it holds alone is no checkpoint
        save = partial(trainer.save_alone, host=assignment.host)
        step, is_orphaned = trainer.standing.committed, lambda: self._mailbox.is_orphaned
        try:
            store = open_store(assignment.order.checkpoint.store_url)
            save_alone(store, Survivor(assignment.member, step, save, is_orphaned))
        except Exception:  # the border: there is nobody left to tell
            log.exception("the worker could not save step %d alone", step)

    def _serve_or_tell(self, order: WorldOrder, former: Former, trainer: Trainer) -> None:
        """Live through one world; if the job fails in it, tell that once, and keep what it had committed."""
        try:
            self._serve(order, former, trainer)
        except BaseException as error:  # noqa: BLE001  (the border to what is the user's)
            self._failures.survive(error, order.form.generation, committed=trainer.standing.committed)

    def _serve(self, order: WorldOrder, former: Former, trainer: Trainer) -> None:
        """Live through one world, from its forming until it ends or breaks."""
        member, form = self._assignment.member, order.form
        started = time.monotonic()
        self._came_to = form.generation
        self._outbox.put(MemberCame(member, form.generation))
        self._lifeline.hold(order.anchor)
        try:
            place = Place(form.generation, form.members.index(member), form.hosts, self._assignment.address)
            self._world = former.form(
                place,
                order.endpoint,
                lambda: not (self._mailbox.has_newer() or self._mailbox.is_orphaned),
                time.sleep,
            )
            self._outbox.put(WorldFormed(member, form.generation, time.monotonic() - started))
            self._mailbox.check(form.generation)  # called off before there was a world to cut
            if self._assignment.order.checkpoint.hold and self._neighbours is not None:
                self._neighbours.meet(form, member, order.endpoint)
            self._outbox.put(self._train(self._world, trainer, form))
        except Broken as error:
            error.__traceback__ = None
            log.warning("world %d broke: %s", form.generation, error)
            is_blank = trainer.standing.committed == BLANK
            unreachable = _named(error, form)
            self._outbox.put(WorldBroken(member, form.generation, str(error), is_blank, unreachable))
        finally:
            if self._world is not None:
                self._world.leave()
            self._world = None

    def _train(self, world: World, trainer: Trainer, form: FormWorld) -> MemberEnded:
        member = self._assignment.member
        settled = trainer.settle(world, [form.members.index(one) for one in form.leaving])
        self._outbox.put(
            Settled(member, world.generation, settled.step, settled.source, settled.seconds, settled.note)
        )
        if form.leaving:  # what they held is with the others now, who form the next world
            return MemberEnded(member, world.generation, trainer.standing.committed, Ending.REGROUP)
        go_on = trainer.save_and_stop if form.only_saves else trainer.run
        ending = go_on(world, self._mailbox, self._outbox.put)
        sha256 = "" if ending is Ending.REGROUP else trainer.weights_sha256()
        return MemberEnded(member, world.generation, trainer.standing.committed, ending, sha256)


def _named(error: Broken, form: FormWorld) -> tuple[str, ...] | None:
    """Name whom of its world a member could not reach; None if it has not looked."""
    if not isinstance(error, Unconnected) or error.unreachable is None:
        return None
    return tuple(form.members[rank] for rank in error.unreachable)


def _device(order: TrainOrder) -> torch.device:
    return torch.device("cuda" if order.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu")


def _keeper(assignment: Assignment) -> KeeperConfig:
    order = assignment.order
    return KeeperConfig(
        run=order.run,
        host=assignment.host,
        store_url=order.checkpoint.store_url,
        arena_bytes=order.checkpoint.arena_bytes,
        lease_s=order.lease_s if order.checkpoint.hold else min(order.lease_s, IDLE_LEASE_S),
        hold=order.checkpoint.hold,
        far=order.checkpoint.tiers,
    )


def _trainer(assignment: Assignment, saver: Saver, device: torch.device, neighbours: Neighbours) -> Trainer:
    order = assignment.order
    job = load_job(order.job.path)
    settings = load_settings(job, order.job.settings)
    training = order.training
    plan = TrainPlan(
        num_steps=training.num_steps,
        virtual_ranks=training.virtual_ranks,
        micro_batch=training.global_batch // training.virtual_ranks,
        seed=training.seed,
        determinism=training.determinism,
        grad_clip=training.grad_clip,
        save_every=order.checkpoint.every_steps,
        source=order.job.source,
        run=order.run,
        spec_digest=order.spec_digest,
        compare_every=training.compare_every,
        optimizer_copies=training.optimizer_copies,
        parameter_copies=training.parameter_copies,
        when_not_finite=training.when_not_finite,
        bucket_mib=training.bucket_mib,
        save_s=order.world.save_s,
    )
    storage = Storage(saver, _restorer(order, neighbours))
    return Trainer(job, settings, plan, member=assignment.member, device=device, storage=storage)


def _restorer(order: TrainOrder, neighbours: Neighbours) -> Callable[[], Loaded | None]:
    """Return how the first member of a world gets its state: from memories, then the store and far tiers."""

    def restore() -> Loaded | None:
        store = open_store(order.checkpoint.store_url)
        far = [StoreSource(open_store(tier.url), tier.label) for tier in order.checkpoint.tiers]
        with neighbours.sources() as near:
            sources = [*near, StoreSource(store), *far]
            if not any(source.steps() for source in sources):
                return None
            loaded = load(sources)
        for damaged in loaded.report.fallbacks:  # else the redone step could not be saved under its name
            set_aside(store, damaged.step, damaged.why)
        return loaded

    return restore
