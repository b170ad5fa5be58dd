"""The peers as engines: what a user would pick instead, each with fsync, on the newest API it has."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path

import torch
from safetensors import safe_open  # type: ignore[import-not-found,unused-ignore]  # the peers' environment
from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torchsnapshot import Snapshot, StateDict  # type: ignore[import-not-found,unused-ignore]

from tests.bench.peers.training import Engine, State


class _Blocking:
    """What engines share whose `save` returns when the checkpoint is durable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fence(self) -> None:
        """Nothing is left to wait for."""

    def settle(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        """Nothing is held."""


class TorchSave(_Blocking):
    """torch.save into a file, and fsync."""

    def save(self, state: State, step: int) -> None:
        """Write the file."""
        with open(self.folder / f"{step}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)

    def restore(self, state: State, step: int) -> State:
        """Map the file and copy it in, which is faster than reading it first."""
        path = self.folder / f"{step}.pt"
        stored = torch.load(path, mmap=True, weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(stored[name])
        return state


class Safetensors(_Blocking):
    """safetensors' save_file, and fsync."""

    def save(self, state: State, step: int) -> None:
        """Write the file."""
        path = self.folder / f"{step}.safetensors"
        save_file(state, path)
        sync(path)
        sync(self.folder)

    def restore(self, state: State, step: int) -> State:
        """Map the file and copy it in."""
        with safe_open(self.folder / f"{step}.safetensors", framework="pt") as stored:
            for name, tensor in state.items():
                tensor.copy_(stored.get_tensor(name))
        return state


class DcpSave(_Blocking):
    """dcp.save, which syncs its files by itself."""

    def save(self, state: State, step: int) -> None:
        """Write the checkpoint."""
        state_dict_saver.save(state, checkpoint_id=self.folder / str(step))

    def restore(self, state: State, step: int) -> State:
        """Read it in place."""
        state_dict_loader.load(state, checkpoint_id=self.folder / str(step))
        return state


class DcpAsync(DcpSave):
    """dcp.async_save. It has no queue of its own, so the one before is waited for, as its users do."""

    def __init__(self, folder: Path, stager: DefaultStager | None = None) -> None:
        super().__init__(folder)
        self._stager = stager
        self._staging: Future[None] | None = None
        self._writing: Future[None] | None = None

    def save(self, state: State, step: int) -> None:
        """Stage the state, or begin to, and write it in the background."""
        self.settle()
        path = self.folder / str(step)
        begun = state_dict_saver.async_save(state, checkpoint_id=path, async_stager=self._stager)
        if isinstance(begun, state_dict_saver.AsyncSaveResponse):
            self._staging, self._writing = begun.staging_completion, begun.upload_completion
        else:
            self._writing = begun

    def fence(self) -> None:
        """Wait for what is still being staged."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def settle(self) -> None:
        """Wait for the files."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Give the staging buffers back."""
        if self._stager is not None:
            self._stager.close()


class Torchsnapshot(_Blocking):
    """torchsnapshot's async_take; a thread syncs its files, which it does not do by itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._syncing: threading.Thread | None = None

    def save(self, state: State, step: int) -> None:
        """Stage the state, and write it in the background."""
        self.settle()
        path = self.folder / str(step)
        pending = Snapshot.async_take(path=str(path), app_state={"state": StateDict(**state)})

        def make_durable() -> None:
            pending.wait()
            for part in [*path.rglob("*"), path, self.folder]:
                sync(part)

        self._syncing = threading.Thread(target=make_durable)
        self._syncing.start()

    def settle(self) -> None:
        """Wait for the files."""
        if self._syncing is not None:
            self._syncing.join()
            self._syncing = None

    def restore(self, state: State, step: int) -> State:
        """Read it in place."""
        held = StateDict(**state)
        Snapshot(str(self.folder / str(step))).restore({"state": held})
        return dict(held)


def open_engine(name: str, folder: Path) -> Engine:
    """Make a peer by its name."""
    match name:
        case "torch.save":
            return TorchSave(folder)
        case "safetensors":
            return Safetensors(folder)
        case "dcp.save":
            return DcpSave(folder)
        case "dcp.async_save":
            return DcpAsync(folder)
        case "dcp.async_save, reused stager":
            return DcpAsync(folder, DefaultStager(_staging(is_async=False)))
        case "dcp.async_save, async stager":
            # Copies in a thread, as Holdfast does; its users have to know that they then have to wait.
            return DcpAsync(folder, DefaultStager(_staging(is_async=True)))
        case "torchsnapshot.async_take":
            return Torchsnapshot(folder)
    raise ValueError(f"no peer {name!r}")


def _staging(*, is_async: bool) -> StagingOptions:
    """Return the options that are fastest here: pinned memory where there is a device to copy from."""
    has_device = torch.cuda.is_available()
    return StagingOptions(
        use_pinned_memory=has_device,
        use_shared_memory=False,
        use_async_staging=is_async,
        use_non_blocking_copy=has_device,
    )


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
