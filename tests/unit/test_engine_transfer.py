"""Transfers: copies end before their region is another's; what is asked of CUDA to page-lock an arena.

A stand-in takes the place of CUDA's runtime, where there is no device.
"""

import mmap
from contextlib import contextmanager

import pytest
import torch

from checkpoint import LocalHost, Saver, Share
from checkpoint.engine.transfer import Transfer
from checkpoint.store.memory import MemoryStore
from tests.fault.checkpoint_worlds import MIB, QUICK, RAW

DEVICE = torch.device("cuda", 3)
TAKEN, REFUSED = 712, 2


class Runtime:
    """The two calls of the CUDA runtime that page-locking is made of; remembers who is the current device."""

    def __init__(self):
        self.code = 0
        self.locked = {}
        self.current = torch.device("cuda", 0)
        self.blamed = []

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802 -- CUDA's own name
        if self.code == 0:
            self.locked[address] = (num_bytes, flags, self.current)
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802 -- CUDA's own name
        assert self.current == DEVICE
        del self.locked[address]
        return 0

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def zeros(self, *_, device):
        self.blamed.append(device)
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")


class Stream:
    """A side stream with nothing on its way."""

    def synchronize(self):
        """Return at once."""


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", runtime.device)
    monkeypatch.setattr(torch, "zeros", runtime.zeros)
    return runtime


def transfer_of():
    transfer = Transfer()
    transfer._streams[DEVICE] = Stream()
    return transfer


def test_an_arena_is_locked_once_for_all_devices_on_the_device_that_is_saved_from(runtime):
    transfer, arena = transfer_of(), mmap.mmap(-1, 1 << 16)
    for first in (0, 4096):
        transfer.prepare(memoryview(arena)[first : first + 64])
    assert [(num_bytes, flags, on) for num_bytes, flags, on in runtime.locked.values()] == [
        (1 << 16, 1, DEVICE)
    ]
    assert runtime.current == torch.device("cuda", 0)
    transfer.release()
    assert not runtime.locked


def test_a_larger_arena_takes_the_place_of_the_one_before(runtime):
    transfer = transfer_of()
    arenas = [mmap.mmap(-1, size) for size in (1 << 16, 1 << 17)]
    for arena in arenas:
        transfer.prepare(memoryview(arena)[:64])
    assert [one[0] for one in runtime.locked.values()] == [1 << 17]
    transfer.release()


def test_what_another_saver_locked_is_left_to_it_to_give_back(runtime):
    arena = mmap.mmap(-1, 1 << 16)
    first, second = transfer_of(), transfer_of()
    first.prepare(memoryview(arena)[:64])
    runtime.code = TAKEN
    second.prepare(memoryview(arena)[:64])
    second.release()
    assert runtime.locked
    first.release()
    assert not runtime.locked


@pytest.mark.parametrize("code", [TAKEN, REFUSED])
def test_the_error_of_a_refused_lock_is_not_left_to_the_next_kernel(runtime, code, caplog):
    runtime.code = code
    transfer, arena = transfer_of(), mmap.mmap(-1, 1 << 16)
    for _ in range(2):
        transfer.prepare(memoryview(arena)[:64])
    assert runtime.blamed == [DEVICE]
    assert ("cannot be page-locked" in caplog.text) == (code == REFUSED)
    transfer.release()


def test_without_a_device_nothing_is_asked(runtime):
    runtime.code = REFUSED
    transfer = Transfer()
    transfer.prepare(memoryview(bytearray(64)))
    transfer.release()
    assert not runtime.locked and not runtime.blamed


def test_copies_that_are_under_way_end_before_a_share_that_failed_is_given_up(monkeypatch):
    happened = []

    def broken(*_):
        raise RuntimeError("on purpose")

    def given_up(*given):
        happened.append("given up")
        spoil(*given)

    monkeypatch.setattr(Transfer, "settle", lambda _: happened.append("copies are over"))
    with LocalHost(MemoryStore("broken"), arena_bytes=4 * MIB, tuning=QUICK) as host:
        saver, spoil = Saver(host, "run", RAW), host.spoil
        monkeypatch.setattr(host, "ready", broken)
        monkeypatch.setattr(host, "spoil", given_up)
        with pytest.raises(RuntimeError, match="on purpose"):
            saver.save(1, {"weight": torch.ones(MIB // 4)}, Share.alone(), {}).result(20)
        saver.close()
    assert happened[:2] == ["copies are over", "given up"]
