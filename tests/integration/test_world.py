"""Worlds over real gloo groups in real processes: what a SIGKILL or a SIGSTOP does to the others."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any, TypeAlias

import pytest
import torch

from elastic.runtime.world import Endpoint, Former, Place, World, open_rendezvous
from elastic.training.ports import Broken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LOOPBACK = "127.0.0.1"
Told: TypeAlias = "Queue[Any]"


def form(former: Former, endpoint: Endpoint, generation: int, rank: int, size: int) -> World:
    place = Place(generation, rank, ("h",) * size, LOOPBACK)
    return former.form(place, endpoint, lambda: True, time.sleep)


def compute(rank: int, size: int, endpoint: Endpoint, told: Told) -> None:
    """Go once through every collective and tell what came out."""
    world = form(Former(LOOPBACK, torch.device("cpu")), endpoint, 1, rank, size)
    received = [torch.zeros(2) if peer != rank else None for peer in range(size)]
    world.exchange(
        [torch.full((2,), 10.0 * rank + peer) if peer != rank else None for peer in range(size)], received
    )
    gathered = torch.zeros(size)
    world.all_gather(gathered, torch.tensor([float(rank)]))
    total, largest = torch.tensor([float(rank)]), torch.tensor([float(rank)])
    world.all_reduce(total, "sum")
    world.all_reduce(largest, "max")
    passed = torch.tensor([42.0 if rank == 0 else 0.0])
    if rank == 0:
        world.send(passed, size - 1)
    if rank == size - 1:
        world.receive(passed, 0)
    swapped = [tensor.tolist() if tensor is not None else None for tensor in received]
    told.put((rank, swapped, gathered.tolist(), total.item(), largest.item(), passed.item()))
    world.leave()


def reduce_for_ever(world: World, tensor: torch.Tensor) -> None:
    while True:
        world.all_reduce(tensor, "max")


def lose_one(rank: int, size: int, endpoint: Endpoint, told: Told) -> None:
    """Reduce for ever; the last rank is killed, the others notice and form a smaller world."""
    former = Former(LOOPBACK, torch.device("cpu"))
    world = form(former, endpoint, 1, rank, size)
    tensor = torch.ones(1_000_000)
    for _ in range(5):
        world.all_reduce(tensor, "max")
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(Broken):
        reduce_for_ever(world, tensor)
    world.leave()
    world = form(former, endpoint, 2, rank, size - 1)
    count = torch.ones(1)
    world.all_reduce(count, "sum")
    told.put((rank, count.item()))
    world.leave()


def be_cut(rank: int, size: int, endpoint: Endpoint, told: Told) -> None:
    """Reduce; the last rank hangs, and rank 0 cuts the world from another thread."""
    world = form(Former(LOOPBACK, torch.device("cpu")), endpoint, 1, rank, size)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Timer(1.0, world.cut).start()
    with pytest.raises(Broken):
        world.all_reduce(torch.ones(10), "sum")
    told.put(rank)
    world.leave()


def run(target: Callable[[int, int, Endpoint, Told], None], size: int) -> tuple[list[Any], Told]:
    context = get_context("spawn")
    store, endpoint = open_rendezvous(LOOPBACK)
    told: Told = context.Queue()
    processes = [context.Process(target=target, args=(rank, size, endpoint, told)) for rank in range(size)]
    for process in processes:
        process.start()
    told.rendezvous = store  # type: ignore[attr-defined]  # it has to live as long as the processes
    return processes, told


def test_every_collective_gives_every_rank_what_it_should() -> None:
    processes, told = run(compute, 3)
    results = sorted(told.get(timeout=60) for _ in processes)
    for rank, swapped, gathered, total, largest, _ in results:
        assert swapped == [None if peer == rank else [10.0 * peer + rank] * 2 for peer in range(3)]
        assert (gathered, total, largest) == ([0.0, 1.0, 2.0], 3.0, 2.0)
    assert results[2][-1] == 42.0


def test_after_a_sigkill_all_survivors_know_and_form_a_smaller_world() -> None:
    processes, told = run(lose_one, 4)
    assert sorted(told.get(timeout=60) for _ in range(3)) == [(rank, 3.0) for rank in range(3)]
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0, -signal.SIGKILL]


def test_cutting_a_world_frees_the_ranks_that_a_hung_one_blocks() -> None:
    processes, told = run(be_cut, 3)
    assert sorted(told.get(timeout=60) for _ in range(2)) == [0, 1]
    processes[-1].kill()


def test_a_world_that_was_called_off_while_forming_breaks_instead_of_waiting() -> None:
    store, endpoint = open_rendezvous(LOOPBACK)
    former = Former(LOOPBACK, torch.device("cpu"))
    slept: list[float] = []
    with pytest.raises(Broken, match="newer world"):
        former.form(Place(1, 0, ("h", "h"), LOOPBACK), endpoint, lambda: not slept, slept.append)
    del store
