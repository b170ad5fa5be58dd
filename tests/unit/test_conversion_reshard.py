"""Resharding: the same content under any layout, chosen and cast tensors, resumption, and what is refused."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint.errors import AlreadyExists, Corrupt, Mismatch, Misuse, NoCheckpoint
from checkpoint.format.layout import Shard, StridedShard
from checkpoint.format.notation import layout_from_json
from checkpoint.interop.conversion import roles, writing
from checkpoint.interop.conversion.contract import ConversionSettings, Overflow
from checkpoint.interop.conversion.resharding import Change, plan_reshard, reshard
from checkpoint.interop.conversion.stored import Stored
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import adam_state, bits_of, block_weights, save_state

REPOSITORY = Path(__file__).resolve().parents[2]
LAYOUTS = [
    "replica=2,shard=4,tensor=2",
    "replica=3,zero=1",
    "replica=5,zero=3",
    "pipeline=2,tensor=3",
    "replica=5,zero=1,tensor=2",
    "replica=3,zero=2,pipeline=2,tensor=2",
    "tensor=3,replica=2,zero=1,shard=2",
    "shard=7",
]


@pytest.fixture(scope="module")
def source():
    store = MemoryStore("source")
    save_state(
        store, adam_state(block_weights()), meta={"data_cursor": {"sample": 9}, "metrics": {"loss": 2.5}}
    )
    return store


def test_a_world_that_cannot_be_meant_is_refused_at_once_and_one_of_many_copies_is_no_work(source):
    target = MemoryStore("target")
    with pytest.raises(Misuse, match="at most 65536 ranks, and this layout has 1000000"):
        plan_reshard(source, target, Change(to="shard=1000000"))
    sizes = {spec.name: spec.shape for spec in Stored(source).tensors}
    for layout in ("shard=65536", "replica=8192,shard=8", "replica=65536,zero=1"):
        report = plan_reshard(source, target, Change(to=layout))
        assert report.num_chunks <= sum(math.prod(shape) for shape in sizes.values())


def test_of_two_conversions_to_one_place_the_slower_one_is_told_and_leaves_nothing(source):
    target, alone = MemoryStore("target"), MemoryStore("alone")
    others: list[str] = []

    def overtake(_: object) -> None:
        if not others:
            others.append("under way")
            reshard(source, target, Change(to="tensor=3"))

    with pytest.raises(AlreadyExists, match="another conversion was faster"):
        reshard(source, target, Change(to="shard=2"), listener=overtake)
    reshard(source, alone, Change(to="tensor=3"))
    there, expected = ({one.key for one in store.list("")} for store in (target, alone))
    assert there == expected
    assert Stored(target).manifest.meta["layout"] == Stored(alone).manifest.meta["layout"]


def test_more_chunks_than_an_index_should_list_are_refused(source, monkeypatch):
    monkeypatch.setattr(roles, "MAX_BOXES", 100)
    with pytest.raises(Misuse, match="more than 100 chunks"):
        plan_reshard(source, MemoryStore("target"), Change(to="shard=64"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_content_and_proves_it(source, layout):
    target = MemoryStore("target")
    report = reshard(source, target, Change(to=layout))
    assert bits_of(target) == bits_of(source)
    assert checkpoint.load(target).state["loop"] == checkpoint.load(source).state["loop"]
    assert checkpoint.verify(target, 3).is_sound
    assert {proof.how for proof in report.proofs} == {"fingerprint"}
    assert len(report.proofs) == report.num_tensors == len(bits_of(source))


def test_what_the_manifest_says_besides_goes_along_with_the_layout(source):
    target = MemoryStore("target")
    reshard(source, target, Change(to="replica=2,shard=4,tensor=2"))
    old, new = checkpoint.Catalog(source).manifest(3), checkpoint.Catalog(target).manifest(3)
    assert (new.run, new.data_cursor, new.metrics) == (old.run, {"sample": 9}, {"loss": 2.5})
    told = dict(new.meta["layout"])
    assert told.pop("scheme") == "replica=2,shard=4,tensor=2"
    layout = layout_from_json(told)
    qkv, out = "model/h.0.attn.qkv.weight", "model/h.0.attn.o_proj.weight"
    assert layout.placements[qkv][1:] == (StridedShard(0, 2), Shard(0))
    assert layout.placements[out][1:] == (Shard(0), Shard(1))
    assert layout.placements["optimizer/state/h.0.attn.o_proj.weight/exp_avg"] == layout.placements[out]


def test_the_chunks_are_the_boxes_of_the_targets_ranks(source):
    target = MemoryStore("target")
    reshard(source, target, Change(to="shard=2,tensor=3"))
    stored = Stored(target)
    number = [one.name for one in stored.tensors].index("model/h.1.attn.o_proj.weight")
    assert {chunk.box.size for chunk in stored.table if chunk.tensor == number} == {(12, 8)}


def test_a_glob_chooses_tensors_and_plain_values_by_their_paths(source):
    target = MemoryStore("target")
    reshard(source, target, Change(only="model/h.*"))
    state = checkpoint.load(target).state
    assert list(state) == ["model"]
    assert len(state["model"]) == 6
    with pytest.raises(Misuse, match=r"'nothing\*' fits nothing of step 3"):
        reshard(source, MemoryStore("other"), Change(only="nothing*"))


@pytest.mark.parametrize("dtype", ["bf16", "float16", "float64"])
def test_weights_are_cast_as_torch_casts_and_proved_by_other_code(source, dtype):
    target = MemoryStore("target")
    report = reshard(source, target, Change(dtype=dtype, to="shard=3"))
    old, new = checkpoint.load(source).state, checkpoint.load(target).state
    kind = {"bf16": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    for name, weight in old["model"].items():
        assert torch.equal(new["model"][name], weight.to(kind)), name
    moments = [state["exp_avg"].dtype for state in new["optimizer"]["state"].values()]
    assert set(moments) == {torch.float32}, "an optimizer's state keeps its precision"
    how = {proof.name: proof.how for proof in report.proofs}
    assert {how[name] for name in how if name.startswith("model/")} == {"reference"}
    assert {how[name] for name in how if not name.startswith("model/")} == {"fingerprint"}


def test_a_dry_run_tells_what_would_be_read_and_writes_nothing(source):
    target = MemoryStore("target")
    change = Change(to="replica=2,shard=3")
    planned = plan_reshard(source, target, change)
    assert target.list("") == []
    done = reshard(source, target, change)
    assert planned.is_dry and planned.read_bytes == done.read_bytes
    assert (planned.num_chunks, planned.num_bytes) == (done.num_chunks, done.num_bytes)


def test_resharding_twice_finds_it_done_and_another_layout_is_refused(source):
    target = MemoryStore("target")
    assert reshard(source, target, Change(to="shard=2")).is_new
    before = target.list("")
    assert not reshard(source, target, Change(to="shard=2")).is_new
    with pytest.raises(AlreadyExists, match="another checkpoint of step 3"):
        reshard(source, target, Change(to="shard=3"))
    assert target.list("") == before


def test_a_step_or_store_without_a_checkpoint_is_named(source):
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 9; it has: 3"):
        reshard(source, MemoryStore("target"), Change(), step=9)
    with pytest.raises(NoCheckpoint, match="holds no checkpoint"):
        reshard(MemoryStore("empty"), MemoryStore("target"), Change())


# ------------------------------------------------------------------------------------ what goes wrong


class Swapping(Stored):
    """Reads a tensor's first two rows in each other's place: as shapes, counts and norms never tell."""

    def read(self, wishes):
        found = super().read(wishes)
        for array in found:
            if array.ndim == 2 and len(array) > 1:
                array[[0, 1]] = array[[1, 0]]
        return found


def test_swapped_rows_are_caught_and_nothing_is_committed(source, monkeypatch):
    target = MemoryStore("target")
    monkeypatch.setattr("checkpoint.interop.conversion.resharding.Stored", Swapping)
    with pytest.raises(Mismatch, match="nothing was committed"):
        reshard(source, target, Change(to="replica=2"))
    assert checkpoint.Catalog(target).steps() == []


def test_a_wrong_cast_is_caught_by_the_reference(source, monkeypatch):
    target = MemoryStore("target")
    truncate = lambda bits, old, new: (bits >> 16).astype("<u2") if new == "bfloat16" else bits  # noqa: E731
    monkeypatch.setattr("checkpoint.interop.conversion.casting.cast", truncate)
    with pytest.raises(Mismatch, match="differs from the source's"):
        reshard(source, target, Change(dtype="bf16"))
    assert checkpoint.Catalog(target).steps() == []


def test_a_damaged_chunk_of_the_source_ends_the_conversion():
    store, target = MemoryStore("source"), MemoryStore("target")
    save_state(store, {"model": {"weight": torch.randn(64, 64)}})
    key = store.list("packs/")[0].key
    data = bytearray(store.read(key)[0])
    data[100] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(Corrupt, match="model/weight"):
        reshard(store, target, Change(to="shard=2"))
    assert checkpoint.Catalog(target).steps() == []


# ---------------------------------------------------------------------------------- cut off, and resumed

ANYWAY = ConversionSettings(overflow=Overflow.ALLOWED)
TIGHT = ConversionSettings(budget_bytes=128 << 20)


class Interrupted(BaseException):
    """A stop in the middle."""


def large_state():
    return {"model": {f"layers.{n}.weight": torch.randn(1 << 20) for n in range(12)}}


def stop_at(share):
    def listener(progress):
        if progress.num_done_bytes >= share * progress.num_bytes:
            raise Interrupted

    return listener


def test_what_was_cut_off_goes_on_from_its_finished_packs():
    source, target = MemoryStore("source"), MemoryStore("target")
    save_state(source, large_state())
    change = Change(to="replica=2,shard=2")
    with pytest.raises(Interrupted):
        reshard(source, target, change, settings=TIGHT, listener=stop_at(0.6))
    assert checkpoint.Catalog(target).steps() == []
    kept = {entry.key for entry in target.list("packs/")}
    assert kept
    report = reshard(source, target, change, settings=TIGHT)
    assert 0 < report.num_resumed_bytes < report.num_bytes
    assert report.read_bytes < report.num_bytes
    assert kept <= {entry.key for entry in target.list("packs/")}
    assert bits_of(target) == bits_of(source)
    named = {pack.key for pack in checkpoint.Catalog(target).manifest(3).packs}
    assert named == {entry.key for entry in target.list("packs/")}, "what is not named is swept"


def test_a_pack_that_cannot_be_read_is_made_anew_and_swept():
    source, target = MemoryStore("source"), MemoryStore("target")
    save_state(source, large_state())
    with pytest.raises(Interrupted):
        reshard(source, target, Change(to="shard=2"), settings=TIGHT, listener=stop_at(0.6))
    broken = target.list("packs/")[0].key
    target.put(broken, bytes(target.read(broken)[0])[:-7])
    reshard(source, target, Change(to="shard=2"), settings=TIGHT)
    assert bits_of(target) == bits_of(source)
    assert broken not in {entry.key for entry in target.list("packs/")}


def test_another_conversion_does_not_take_up_what_this_one_left():
    source, target = MemoryStore("source"), MemoryStore("target")
    save_state(source, large_state())
    with pytest.raises(Interrupted):
        reshard(source, target, Change(to="shard=2"), settings=TIGHT, listener=stop_at(0.6))
    assert reshard(source, target, Change(to="shard=3"), settings=TIGHT).num_resumed_bytes == 0
    assert bits_of(target) == bits_of(source)


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_packed(tmp_path):
    source = checkpoint.open_store(str(tmp_path / "source"))
    save_state(source, large_state())
    script = (
        "import os, signal, sys, checkpoint\n"
        "from checkpoint.interop.conversion.contract import ConversionSettings\n"
        "from checkpoint.interop.conversion.resharding import Change, reshard\n"
        "def listener(p):\n"
        "    if p.num_done_bytes > 0.7 * p.num_bytes: os.kill(os.getpid(), signal.SIGKILL)\n"
        "source, target = map(checkpoint.open_store, sys.argv[1:])\n"
        "settings = ConversionSettings(budget_bytes=128 << 20)\n"
        "reshard(source, target, Change(to='shard=2'), settings=settings, listener=listener)\n"
    )
    places = [str(tmp_path / name) for name in ("source", "target")]
    done = subprocess.run(
        [sys.executable, "-c", script, *places], cwd=REPOSITORY, env={**os.environ}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    target = checkpoint.open_store(places[1])
    report = reshard(source, target, Change(to="shard=2"), settings=TIGHT)
    assert report.num_resumed_bytes > 0
    assert bits_of(target) == bits_of(source)


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_pack_that_is_lost_after_its_receipt_is_made_anew(source, monkeypatch, is_gone):
    target = MemoryStore("target")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "try_commit", die)
        with pytest.raises(KeyboardInterrupt):
            reshard(source, target, Change(to="shard=2"))
    (first, *_) = (one.key for one in target.list("packs/"))
    damaged = bytearray(target.read(first)[0])
    damaged[100] ^= 0xFF
    target.delete(first)
    if not is_gone:
        target.put(first, bytes(damaged))
    reshard(source, target, Change(to="shard=2"))
    assert bits_of(target) == bits_of(source)


@pytest.mark.slow
def test_memory_stays_within_the_budget_however_large_the_state(tmp_path):
    num_bytes = 240 << 20
    source = checkpoint.open_store(str(tmp_path / "source"))
    save_state(source, {"model": {f"{n}.weight": torch.randn(num_bytes // 24, 2) for n in range(3)}})
    script = (
        "import sys, checkpoint\n"
        "from checkpoint.interop.conversion.contract import ConversionSettings\n"
        "from checkpoint.interop.conversion.resharding import Change, reshard\n"
        "source, target = map(checkpoint.open_store, sys.argv[1:])\n"
        "settings = ConversionSettings(budget_bytes=128 << 20)\n"
        "report = reshard(source, target, Change(to='shard=3'), settings=settings)\n"
        "print(report.grown_bytes)\n"
    )
    places = [str(tmp_path / name) for name in ("source", "target")]
    done = subprocess.run(
        [sys.executable, "-c", script, *places], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.25 * (128 << 20), "what the allocator keeps comes on top"


def test_a_budget_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 128 MiB"):
        ConversionSettings(budget_bytes=1 << 20)
    for budget in (128 << 20, 1 << 30, 1 << 34):
        settings = ConversionSettings(budget_bytes=budget)
        assert settings.peak_bytes <= budget
        assert settings.batch_bytes >= 4 << 20


def test_values_that_are_no_numbers_and_extremes_survive_a_cast():
    extremes = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-45,
        -1e-40,
        3.4e38,
        65504.0,
        65520.0,
        6e-8,
        2.0**-25,
    ]
    source = MemoryStore("source")
    save_state(
        source, {"model": {"w": torch.tensor(extremes), "d": torch.tensor(extremes, dtype=torch.float64)}}
    )
    for dtype in ("bf16", "fp16", "float32", "float64"):
        target = MemoryStore("target")
        reshard(source, target, Change(dtype=dtype), settings=ANYWAY)
        assert checkpoint.load(target).state["model"]["w"].isnan().tolist() == [
            math.isnan(x) for x in extremes
        ]
