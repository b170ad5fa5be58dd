"""One rank of a world that saves or loads a sharded state with torch's checkpoints and ours, in turns."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict_loader
import torch.distributed.checkpoint.state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoint import Checkpointer, Codec, Options, SavePolicy

ROWS = 1024  # of 4 KiB each: a tensor has 4 MiB times `wide`


@dataclass(frozen=True)
class Place:
    """Where a rank is, where the checkpoints are, and how large the state is."""

    directory: Path
    rank: int
    size: int
    num_tensors: int
    wide: int
    rounds: int
    tensor: int = 1


def main(arguments: list[str]) -> None:
    """Save or load; rank 0 of the loading world writes what it took."""
    kind, directory, *numbers = arguments
    place = Place(Path(directory), *map(int, numbers))
    meeting = f"file://{place.directory}/meeting-{kind}{place.size}"
    dist.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.size)
    torch.set_num_threads(1)
    if kind == "save":
        save(place)
    else:
        load(place)
    dist.destroy_process_group()


def state_of(place: Place, fill: Callable[..., torch.Tensor]) -> dict[str, DTensor]:
    """Make the state as this world divides it: by rows; among tensor ranks by rows and columns in turn."""
    ways = (place.size // place.tensor, place.tensor)
    mesh = init_device_mesh("cpu", ways, mesh_dim_names=("shard", "tensor"))
    shape = (ROWS * place.wide, 1024)
    return {
        f"layers.{number}.weight": distribute_tensor(fill(shape), mesh, [Shard(0), Shard(number % 2)])
        for number in range(place.num_tensors)
    }


def save(place: Place) -> None:
    """Save it with both."""
    torch.manual_seed(1)
    state = state_of(place, torch.randn)
    dcp.state_dict_saver.save({"model": state}, checkpoint_id=str(place.directory / "dcp"))
    with Checkpointer(str(place.directory / "ours"), options=options(place)) as checkpointer:
        checkpointer.save(1, {"model": state})
        if not checkpointer.wait():
            raise RuntimeError("the checkpoint was not saved")


def load(place: Place) -> None:
    """Load it with both, round by round, into the same memory, and see that it is the same."""
    state = state_of(place, torch.zeros)
    taken: dict[str, list[float]] = {"ours": [], "dcp": [], "plain": []}
    read: list[int] = []
    sums = []
    with Checkpointer(str(place.directory / "ours"), options=options(place)) as checkpointer:

        def ours() -> None:
            restored = checkpointer.restore({"model": state})
            if restored is None:
                raise RuntimeError("there is no checkpoint")
            read.append(restored.report.num_bytes)

        def torchs() -> None:
            dcp.state_dict_loader.load({"model": state}, checkpoint_id=str(place.directory / "dcp"))

        works: list[tuple[str, Callable[[], None]]] = [("ours", ours), ("dcp", torchs)]
        works.append(("plain", partial(read_plainly, place, state)))
        for number in range(place.rounds + 1):
            for name, work in works if number % 2 else reversed(works):
                for one in state.values():
                    one.to_local().zero_()
                seconds = timed(work)
                if name != "plain":
                    sums.append(sum(float(one.to_local().double().sum()) for one in state.values()))
                if number:  # the first warms caches up
                    taken[name].append(seconds)
    if len(set(sums)) != 1:
        raise RuntimeError(f"the two restored different states: {set(sums)}")
    needed = sum(one.to_local().nbytes for one in state.values())
    told: list[Any] = [None] * place.size
    dist.all_gather_object(told, {"taken": taken, "read": max(read), "needed": needed})
    if place.rank == 0:
        (place.directory / "told.json").write_text(json.dumps(told))


def read_plainly(place: Place, state: Mapping[str, DTensor]) -> None:
    """The control: as many bytes as this rank needs, from the same disk's cache, whatever they say."""
    paths = sorted((place.directory / "dcp").glob("*.distcp"))
    with paths[place.rank % len(paths)].open("rb", buffering=0) as file:
        for one in state.values():
            memory = one.to_local().contiguous().numpy().reshape(-1).view(np.uint8).data
            while memory:
                memory = memory[file.readinto(memory) or file.seek(0) :]


def options(place: Place) -> Options:
    """Store raw bytes, as torch does; keep the sockets of each world's keeper apart."""
    kept = place.directory / f"keeper{place.size}-{place.tensor}"
    kept.mkdir(mode=0o700, exist_ok=True)
    return Options(saving=SavePolicy(codec=Codec.RAW), directory=kept, lease_s=1.0)


def timed(work: Callable[[], None]) -> float:
    """Return how long the slowest rank takes."""
    dist.barrier()
    started = time.perf_counter()
    work()
    longest = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads outlive its groups: now and then one of them aborts an interpreter that ends
