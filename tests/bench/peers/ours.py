"""Holdfast as an engine, and the controls: what the machine itself can do with the same bytes."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from checkpoint import (
    Codec,
    Durable,
    KeeperConfig,
    SavePolicy,
    Saver,
    Share,
    connect,
    flatten_state,
    open_store,
    specs_of,
)
from checkpoint.engine.contract import Depth
from checkpoint.engine.restore import restore_into
from checkpoint.engine.targets import Wanted
from checkpoint.format.box import Box
from checkpoint.format.codec import checksum
from checkpoint.format.fingerprint import fingerprint
from tests.bench.peers.training import Engine, State

_RUN = "bench"
_SETTLE_S = 60.0
_POLL_S = 0.001
_CONTROL_THREADS = 2
_CONTROL_BYTES = 4 << 20  # of one read, checksum and fingerprint: as much as a chunk has


class Holdfast:
    """A saver with a keeper; every checkpoint it was given has to become durable."""

    def __init__(self, folder: Path, policy: SavePolicy, depth: Depth, arena_bytes: int) -> None:
        self._depth = depth
        self._url = str(folder / "store")
        self.config = KeeperConfig(
            _RUN,
            "local",
            self._url,
            arena_bytes=arena_bytes,
            hold=1 if depth == "memory" else 0,
            lease_s=1.0,
            directory=folder / "keeper",
        )
        (folder / "keeper").mkdir(mode=0o700)
        self._host = connect(self.config)
        self._saver = Saver(self._host, _RUN, policy)
        self._pending: set[int] = set()

    def save(self, state: State, step: int) -> None:
        """Ask for a snapshot."""
        self._pending.add(step)
        self._saver.save(step, state, Share.alone(), {}, depth=self._depth)

    def fence(self) -> None:
        """Wait for the capture."""
        self._saver.wait_captured()

    def settle(self) -> None:
        """Wait for the final outcome of each snapshot."""
        deadline = time.monotonic() + _SETTLE_S
        while self._pending:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no word of the checkpoints of steps {sorted(self._pending)}")
            for outcome in self._saver.outcomes():
                if not isinstance(outcome, Durable):
                    raise RuntimeError(f"a checkpoint was lost: {outcome}")
                if outcome.tier == self._depth:
                    self._pending.discard(outcome.step)
            time.sleep(_POLL_S)

    def restore(self, state: State, step: int) -> State:
        """Read and prove a checkpoint, straight into the tensors."""
        tensors = flatten_state(state).tensors
        wanted = [
            Wanted(spec.name, spec.dtype, spec.shape, Box.whole(spec.shape), tensors[spec.name])
            for spec in specs_of(tensors)
        ]
        restore_into(open_store(self._url), wanted, step=step)
        return state

    def close(self) -> None:
        """Leave the keeper, and wait until it has ended and removed its directory itself."""
        self._saver.close()
        self._host.close()
        while self.config.home.exists():
            time.sleep(_POLL_S)


class RawFile:
    """The control: the state's bytes written to one file, with fsync; read and proved by two threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._proofs: dict[int, dict[tuple[str, int], tuple[bytes, int]]] = {}

    def save(self, state: State, step: int) -> None:
        """Write the file."""
        descriptor = os.open(self._folder / f"{step}.raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for tensor in state.values():
                left = tensor.numpy().data.cast("B")
                while left:
                    left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def fence(self) -> None:
        """Nothing is left to wait for."""

    def settle(self) -> None:
        """Nothing is left to wait for."""

    def restore(self, state: State, step: int) -> State:
        """Read the file into the tensors, with the checksum and the fingerprint of each part."""
        parts, offset = [], 0
        for tensor in state.values():
            raw = tensor.numpy().reshape(-1).view(np.uint8)
            for start in range(0, raw.size, _CONTROL_BYTES):
                parts.append((raw, start, offset + start))
            offset += raw.size
        descriptor = os.open(self._folder / f"{step}.raw", os.O_RDONLY)

        def fill(part: tuple[np.ndarray, int, int]) -> int:
            raw, start, place = part
            target = raw[start : start + _CONTROL_BYTES]
            os.preadv(descriptor, [target.data], place)
            checksum(target.data)
            first = start // 4
            box = Box((first,), (target.size // 4,))
            return fingerprint(target.view("<f4"), "float32", (raw.size // 4,), box)

        try:
            with ThreadPoolExecutor(_CONTROL_THREADS) as pool:
                list(pool.map(fill, parts))
        finally:
            os.close(descriptor)
        return state

    def close(self) -> None:
        """Nothing is held."""


class Nothing:
    """The control: a training that keeps no checkpoints."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, state: State, step: int) -> None:
        """Keep nothing."""

    def fence(self) -> None:
        """Nothing is left to wait for."""

    def settle(self) -> None:
        """Nothing is left to wait for."""

    def restore(self, state: State, step: int) -> State:
        """Give back what is there."""
        return state

    def close(self) -> None:
        """Nothing is held."""


def open_engine(name: str, folder: Path, arena_bytes: int) -> Engine:
    """Make one of ours, or a control, by its name."""
    match name:
        case "holdfast":
            return Holdfast(folder, SavePolicy(codec=Codec.RAW), "store", arena_bytes)
        case "holdfast, codec":
            return Holdfast(folder, SavePolicy(), "store", arena_bytes)
        case "holdfast, memory":
            return Holdfast(folder, SavePolicy(), "memory", arena_bytes)
        case "raw write + fsync":
            return RawFile(folder)
        case "nothing":
            return Nothing(folder)
    raise ValueError(f"no engine {name!r}")
