"""A checkpoint that somebody tampered with, on its whole way: refused, or passed over for the older one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import (
    Catalog,
    Checkpointer,
    CheckpointError,
    Durable,
    Mismatch,
    Options,
    StoreRefused,
    load,
    open_store,
    verify,
)
from checkpoint.format.keys import manifest_key
from tests.fault.checkpoint_attacks import ATTACKS, NEWEST, OLDER, state_at, write_run
from tests.fault.checkpoint_worlds import same_bits

FOREIGN = ("a tensor of a terabyte", "a skeleton of many storeys")  # as another model's checkpoint would be
HERE = Options(kept="in this process", arena_mib=8)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_tampered_with_is_refused_by_name_and_passed_over_otherwise(tmp_path, attack):
    store = write_run(tmp_path / "run")
    ATTACKS[attack](store, tmp_path / "run")
    with pytest.raises(CheckpointError):
        load(store, NEWEST)
    loaded = load(store)
    assert same_bits(loaded.state, state_at(OLDER))
    assert [one.step for one in loaded.report.fallbacks] == [NEWEST]


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name not in FOREIGN])
def test_a_training_loop_goes_on_from_the_step_before_the_one_that_was_tampered_with(tmp_path, attack):
    store = write_run(tmp_path / "run")
    ATTACKS[attack](store, tmp_path / "run")
    state = state_at(0)
    with Checkpointer(str(tmp_path / "run"), options=HERE) as checkpointer:
        with pytest.raises(CheckpointError):
            checkpointer.restore(state, NEWEST)
        restored = checkpointer.restore(state)
        assert restored is not None and restored.step == OLDER and same_bits(state, state_at(OLDER))
        assert [one.step for one in restored.report.fallbacks] == [NEWEST]
        saving = checkpointer.save(NEWEST, state_at(NEWEST))
        assert saving is not None
        assert isinstance(saving.durable().result(20), Durable)
    assert Catalog(store).steps() == [OLDER, NEWEST] and verify(store).is_sound
    assert same_bits(load(store).state, state_at(NEWEST)) and load(store).report.fallbacks == ()


@pytest.mark.parametrize("attack", FOREIGN)
def test_what_looks_like_another_model_s_checkpoint_is_refused_by_what_differs(tmp_path, attack):
    ATTACKS[attack](write_run(tmp_path / "run"), tmp_path / "run")
    with Checkpointer(str(tmp_path / "run"), options=HERE) as checkpointer:
        with pytest.raises(Mismatch, match=r"flat is float32|absent: drifting, flat"):
            checkpointer.restore(state_at(0))
        restored = checkpointer.restore(state_at(0), OLDER)
        assert restored is not None and restored.step == OLDER


@pytest.mark.slow
def test_no_attack_takes_more_memory_than_a_sound_restore_would(tmp_path):
    roots = [str(tmp_path / str(number) / "run") for number in range(len(ATTACKS))]
    for root, attack in zip(roots, ATTACKS.values(), strict=True):
        attack(write_run(Path(root)), Path(root))
    command = [sys.executable, "-m", "tests.fault.checkpoint_attacks", *roots]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for name, line in zip(ATTACKS, done.stdout.splitlines(), strict=True):
        refusal, fallback = json.loads(line)
        assert not refusal.startswith("step") and fallback == f"step {OLDER}", (name, line)


def test_foreign_files_among_the_checkpoints_are_no_checkpoints(tmp_path):
    store = write_run(tmp_path)
    for name in (
        "README",
        "manifests/notes.txt",
        "manifests/7",
        "manifests/000000000007.tmp",
        "packs/x",
        ".DS_Store",
    ):
        (tmp_path / name).write_bytes(b"hello")
    (tmp_path / "manifests" / "000000000008").mkdir()
    (tmp_path / "manifests" / ".000000000009").write_bytes(b"hello")
    (tmp_path / "manifests" / "000000000010").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "manifests" / "000000000011")
    assert Catalog(store).steps() == [OLDER, NEWEST] and Catalog(store).latest() == NEWEST
    assert same_bits(load(store).state, state_at(NEWEST)) and load(store).report.fallbacks == ()
    assert verify(store).is_sound


def test_a_pipe_in_the_place_of_an_object_is_not_waited_for(tmp_path):
    store = write_run(tmp_path)
    for key in (manifest_key(NEWEST), Catalog(store).manifest(OLDER).packs[0].key):
        (tmp_path / key).unlink()
        os.mkfifo(tmp_path / key)
    for step in (OLDER, NEWEST, None):
        with pytest.raises(CheckpointError):
            load(store, step)


def test_a_link_to_itself_is_a_clear_error(tmp_path):
    store = write_run(tmp_path)
    (tmp_path / manifest_key(NEWEST + 1)).symlink_to(tmp_path / manifest_key(NEWEST + 1))
    with pytest.raises(StoreRefused, match="symbolic links"):
        load(store)


@pytest.mark.parametrize("content", [b"", b"hello", b"{}\n", bytes(4096), b"\x80\x04pickle"])
def test_a_file_that_only_is_called_a_manifest_is_reported_and_passed_over(tmp_path, content):
    store = write_run(tmp_path)
    (tmp_path / manifest_key(NEWEST + 1)).write_bytes(content)
    assert Catalog(store).latest() == NEWEST
    loaded = load(store)
    assert loaded.manifest.step == NEWEST
    assert [one.step for one in loaded.report.fallbacks] == [NEWEST + 1]


def test_no_object_is_unpickled_whatever_stands_in_its_place(tmp_path):
    store = write_run(tmp_path / "run")
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    for entry in store.list(""):
        torch.save(Trap(), tmp_path / "pickle")
        store.put(entry.key, (tmp_path / "pickle").read_bytes())
    with pytest.raises(CheckpointError):
        load(open_store(str(tmp_path / "run")))
    assert not trap.exists()
