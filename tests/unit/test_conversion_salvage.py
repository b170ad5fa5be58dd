"""What a resumed conversion reads of the packs it found: many chunks at a time, several packs at once."""

import pytest
import torch

from checkpoint.interop.conversion.contract import ConversionSettings
from checkpoint.interop.conversion.resharding import Change, reshard
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import bits_of, save_state

TIGHT = ConversionSettings(budget_bytes=128 << 20)


class Interrupted(BaseException):
    """A stop in the middle."""


class Counting(MemoryStore):
    """A store that counts the ranges of each read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.reads: list[int] = []

    def read(self, key, ranges=None):
        self.reads.append(len(ranges or ()))
        return super().read(key, ranges)


def test_finished_packs_of_many_small_chunks_are_proved_with_few_requests():
    source, target = MemoryStore("source"), Counting("target")
    save_state(source, {"model": {f"{n}.weight": torch.randn(1 << 13) for n in range(1600)}})

    def stop(progress):
        if progress.num_done_bytes >= 0.7 * progress.num_bytes:
            raise Interrupted

    with pytest.raises(Interrupted):
        reshard(source, target, Change(to="replica=2"), settings=TIGHT, listener=stop)
    num_packs = len(target.list("packs/"))
    target.reads.clear()
    report = reshard(source, target, Change(to="replica=2"), settings=TIGHT)
    assert num_packs >= 2 and report.num_resumed_bytes > 8 << 20
    assert max(target.reads) > 20
    assert len(target.reads) < 8 * num_packs + 20
    assert bits_of(target) == bits_of(source)
