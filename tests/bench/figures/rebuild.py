"""A lost host's 256 MiB: rebuilt from its peers' memories, and read through s3:// from a real S3 server.

Keeper processes on this machine stand for the hosts and talk over loopback, as the S3 server does. Both go
the whole way of a restore, proof of every chunk included, into memory that is there already.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from checkpoint import LocalHost, Outcome, Store, StoreSource, Wanted, open_store, restore_into
from checkpoint.engine.source import Source
from checkpoint.format.layout import Box
from checkpoint.keeper.peering.policy import Addresses, Parity
from checkpoint.keeper.peering.source import PeerSource
from tests.bench.figures.session import console, rounds
from tests.bench.harness import Effort, Goal, Row, row
from tests.contract.s3_suite import BUCKET, credentials
from tests.fault.checkpoint_shares import Rows, give, told
from tests.fault.peer_worlds import eventually, hosts_of
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, missing_programs

_MIB = 1 << 20
_SHARE_BYTES = 256 * _MIB
_CHUNK_ELEMENTS = 1 << 20  # of four bytes
_NUM_HOSTS, _LOST = 3, 1
_PARITY, _MEMORY = "parity", "its keeper's memory"


def rebuild(effort: Effort) -> list[Row]:
    """Measure both in turn, in MB/s of the lost host's bytes."""
    num_chunks = _SHARE_BYTES // 4 // _CHUNK_ELEMENTS // (4 if effort is Effort.QUICK else 1)
    state = _state(num_chunks)
    arena_bytes = num_chunks * 4 * _CHUNK_ELEMENTS + 16 * _MIB
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-rebuild-")))
        hosts = stack.enter_context(
            hosts_of(root, _NUM_HOSTS, Parity(_NUM_HOSTS, 1), arena_bytes=arena_bytes)
        )
        hosts.give(1, state)
        hosts.await_told("parity", 1)
        from_peers = partial(_from_peers, hosts.addresses, state, num_chunks)
        seconds = _timed({_MEMORY: partial(from_peers, "peers")}, effort)
        hosts.kill(f"h{_LOST}")
        works: dict[str, Callable[[], object]] = {_PARITY: partial(from_peers, _PARITY)}
        if missing := missing_programs():
            console.print(f"  no S3 server here ({', '.join(missing)}): see deploy/apt.txt")
        else:
            works |= _through_s3(stack.enter_context(_stored(state)), state, num_chunks)
        seconds |= _timed(works, effort)
    speeds = {name: num_chunks * 4 * _CHUNK_ELEMENTS / 1e6 / median(each) for name, each in seconds.items()}
    return _rows(num_chunks * 4 * _CHUNK_ELEMENTS // _MIB, speeds)


def _rows(num_mib: int, speeds: dict[str, float]) -> list[Row]:
    """Compare what parity and memory give with the fastest way through s3://."""
    rebuilt, kept = speeds.pop(_PARITY), speeds.pop(_MEMORY)
    names = (
        f"{num_mib} MiB of a lost host, restored from parity over {_NUM_HOSTS} hosts",
        f"{num_mib} MiB of another host, restored from {_MEMORY}",
    )
    goal = Goal(">=", 2.0, of="ratio")
    return [
        row(names[0], "MB/s", ours=rebuilt, peers=speeds, better="higher", goal=goal),
        row(names[1], "MB/s", ours=kept, peers=speeds, better="higher"),
    ]


def _state(num_chunks: int) -> Rows:
    """Make tensors of which every host holds a chunk, each another one."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 1 << 31, (num_chunks, _CHUNK_ELEMENTS), np.int32)
    return {
        f"t{number:03d}": np.concatenate([chunk ^ host for host in range(_NUM_HOSTS)])
        for number, chunk in enumerate(first)
    }


def _lost(values: Any) -> Any:
    return values[_LOST * _CHUNK_ELEMENTS : (_LOST + 1) * _CHUNK_ELEMENTS]


def _from_peers(addresses: Addresses, state: Rows, num_chunks: int, origin: str) -> None:
    """Restore the lost host's share out of memories, as a rank of the first host does."""
    box = Box((_LOST * _CHUNK_ELEMENTS,), (_CHUNK_ELEMENTS,))
    with closing(PeerSource(addresses, "h0")) as source:
        by_source = _restore(source, state, _NUM_HOSTS * _CHUNK_ELEMENTS, box)
    if by_source != {origin: num_chunks * 4 * _CHUNK_ELEMENTS}:
        raise AssertionError(f"not from {origin} alone: {by_source}")


def _through_s3(store: Store, state: Rows, num_chunks: int) -> dict[str, Callable[[], object]]:
    """Return two ways to the same bytes in an object store: restored, and read without any proof."""
    lost = {name: _lost(values) for name, values in state.items()}
    box = Box((0,), (_CHUNK_ELEMENTS,))
    return {
        "s3://": partial(_restore, StoreSource(store), lost, _CHUNK_ELEMENTS, box),
        "s3://, bytes only": lambda: [store.read(entry.key) for entry in store.list("packs/")],
    }


def _restore(source: Source, state: Rows, num_elements: int, box: Box) -> Mapping[str, int]:
    """Restore a box of every tensor, and make sure that it is right."""
    targets = {name: _memory(name) for name in state}
    wanted = [
        Wanted(name, "int32", (num_elements,), box, torch.from_numpy(memory))
        for name, memory in targets.items()
    ]
    report = restore_into(source, wanted).report
    name = min(targets)
    if not np.array_equal(targets[name], state[name][box.start[0] : box.stop[0]]):
        raise AssertionError(f"{name} is not what was saved")
    return report.bytes_by_source


_memories: dict[str, Any] = {}


def _memory(name: str) -> Any:
    """Return the memory that a tensor is restored to: the same each time, as in a trainer."""
    return _memories.setdefault(name, np.zeros(_CHUNK_ELEMENTS, np.int32))


@contextmanager
def _stored(state: Rows) -> Iterator[Store]:
    """Start an S3 server that has a checkpoint of the lost host's share, raw."""
    server = S3Server()
    try:
        server.start()
        with credentials(server.endpoint, ACCESS_KEY, SECRET_KEY):
            store = open_store(f"s3://{BUCKET}/rebuild")
            seen: list[Outcome] = []
            with LocalHost(store) as host:
                give(host, 1, {name: _lost(values) for name, values in state.items()})
                eventually(lambda: ("Durable", "store", 1) in told(host, seen), seen)
            yield store
    finally:
        server.stop()


def _timed(works: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Sequence[float]]:
    """Do each work in turn; return how long it took each time."""
    seconds = defaultdict(list)

    def turn(name: str) -> None:
        began = time.perf_counter()
        works[name]()
        seconds[name].append(time.perf_counter() - began)

    for work in works.values():
        work()
    rounds(3 if effort is Effort.QUICK else 7, [partial(turn, name) for name in works])
    return dict(seconds)
