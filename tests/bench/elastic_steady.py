"""Four processes that train in turn: ours bitwise, ours fast, and torch DDP accumulating under `no_sync`.

The same model, micro-batches, clipping and optimizer; the same sockets' network; in every round each takes
its turn, so whatever else the machine does falls on all of them alike.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.nn.parallel import DistributedDataParallel

from elastic.runtime.world import Endpoint, Former, Place, World, open_rendezvous
from elastic.training.buckets import BUCKET_MIB
from elastic.training.job import Split
from elastic.training.plan import TrainPlan
from elastic.training.ports import Flags
from elastic.training.trainer import Storage, Trainer

LOOPBACK = "127.0.0.1"
SIZE, SEED = 4, 0
TIMEOUT_S = 900
ENDLESS = 1_000_000
Way = Literal["bitwise", "fast", "bitwise, after", "fast, after", "shrunken", "DDP"]
"""`after`: not overlapping with backward. `shrunken`: bitwise, in a world that has lost its last rank."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: `rounds` of `steps` steps each way, with the job that `job` makes of the seconds that
    it waits; those of the last rank are `slowness` times as many.
    """

    rounds: int
    steps: int
    ways: tuple[Way, ...]
    virtual_ranks: int
    job: Callable[[float], Any]
    settings: Any
    wait_s: float = 0.0
    slowness: float = 1.0
    micro_batch: int = 2


class Attributed(DistributedDataParallel):
    """DDP that also answers for its model's attributes, which the job's loss reads."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class StopAfter:
    """Orders to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def pending(self) -> Flags:
        self._left -= 1
        return Flags(stop=int(self._left <= 0))

    def check(self, generation: int) -> None:
        pass


def step_times(plan: Plan) -> dict[Way, float]:
    """Return the seconds of a step each way: the median over the rounds of the slowest rank's mean."""
    store, endpoint = open_rendezvous(LOOPBACK)
    context = get_context("spawn")
    told: Queue[list[tuple[Way, float]]] = context.Queue()
    members = [context.Process(target=_live, args=(rank, plan, endpoint, told)) for rank in range(SIZE)]
    for process in members:
        process.start()
    try:
        everyones = [told.get(timeout=TIMEOUT_S) for _ in members]
        for process in members:
            process.join(timeout=30)
    finally:
        for process in members:
            process.kill()
    del store
    slowest = [
        (way, max(each[index][1] for each in everyones)) for index, (way, _) in enumerate(everyones[0])
    ]
    return {way: median(seconds for each, seconds in slowest if each == way) for way in plan.ways}


def _live(rank: int, plan: Plan, endpoint: Endpoint, told: Any) -> None:
    torch.set_num_threads(1)
    job = plan.job(plan.wait_s * (plan.slowness if rank == SIZE - 1 else 1.0))
    former = Former(LOOPBACK, torch.device("cpu"))
    worlds = [_world(former, endpoint, rank, SIZE)]
    turns: dict[Way, Callable[[int], object]] = {}
    for way in plan.ways:
        if way == "DDP":
            turns[way] = _ddp(job, plan, rank, endpoint)
        elif way == "shrunken" and rank == SIZE - 1:
            turns[way] = _start_replacement
        elif way == "shrunken":
            worlds.append(_world(former, endpoint, rank, SIZE - 1))
            turns[way] = _ours(job, plan, way, worlds[-1])
        else:
            turns[way] = _ours(job, plan, way, worlds[0])
    told.put(list(_measured(turns, plan, worlds[0])))
    for world in worlds:
        world.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _world(former: Former, endpoint: Endpoint, rank: int, size: int) -> World:
    return former.form(Place(size, rank, ("here",) * size, LOOPBACK), endpoint, lambda: True, time.sleep)


def _measured(
    turns: dict[Way, Callable[[int], object]], plan: Plan, world: World
) -> Iterator[tuple[Way, float]]:
    for round_ in range(plan.rounds + 1):
        for way, turn in turns.items():
            world.all_reduce(torch.zeros(1), "sum")
            started = time.perf_counter()
            turn(plan.steps)
            if round_:  # the first one warms up
                yield way, (time.perf_counter() - started) / plan.steps


def _start_replacement(_: int) -> None:
    """Start what a cold replacement starts: an interpreter that imports all that a worker does."""
    subprocess.Popen([sys.executable, "-c", "import elastic.runtime.worker, elastic.training.gpt"])


def _ours(job: Any, plan: Plan, way: Way, world: World) -> Callable[[int], object]:
    training = TrainPlan(
        num_steps=ENDLESS,
        virtual_ranks=plan.virtual_ranks,
        micro_batch=plan.micro_batch,
        seed=SEED,
        determinism="fast" if way.startswith("fast") else "bitwise",
        grad_clip=1.0,
        save_every=ENDLESS,
        source="stdlib",
        run="bench",
        spec_digest="",
        bucket_mib=0.0 if way.endswith("after") else BUCKET_MIB,
    )
    trainer = Trainer(job, plan.settings, training, member="m", device=torch.device("cpu"), storage=Storage())
    trainer.settle(world)
    return lambda steps: trainer.run(world, StopAfter(steps), lambda _: None)


def _ddp(job: Any, plan: Plan, rank: int, endpoint: Endpoint) -> Callable[[int], object]:
    store = TCPStore(endpoint.host, endpoint.port, is_master=False)
    dist.init_process_group("gloo", store=PrefixStore("ddp", store), rank=rank, world_size=SIZE)
    split = Split(
        name="train", source="stdlib", seed=SEED, micro_batch=plan.micro_batch, settings=plan.settings
    )
    dataset = job.dataset(split)
    model = job.model(plan.settings)
    optimizer = job.optimizer(model)
    ddp: Any = Attributed(model)
    mine = range(rank, plan.virtual_ranks, SIZE)
    return _Ddp(job, dataset, ddp, optimizer, mine).run


@dataclass(slots=True)
class _Ddp:
    """DDP's loop, as its users write it."""

    job: Any
    dataset: Any
    model: Any
    optimizer: Any
    mine: Sequence[int]
    step: int = 0

    def run(self, steps: int) -> None:
        """Train so many steps."""
        rng = torch.Generator()
        for _ in range(steps):
            for index, virtual_rank in enumerate(self.mine):
                is_last = index == len(self.mine) - 1
                with nullcontext() if is_last else self.model.no_sync():
                    batch = self.job.batch(self.dataset, self.step, virtual_rank)
                    (self.job.loss(self.model, batch, rng) / len(self.mine)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
            self.step += 1
