"""What somebody who can write to a checkpoint's directory may do to its newest step, checksums included."""

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import zstandard

from checkpoint import Catalog, CheckpointError, Codec, LocalHost, SavePolicy, Saver, Store, load, open_store
from checkpoint.engine.source import StoreSource
from checkpoint.format.keys import manifest_key, pack_key, page_key
from checkpoint.format.manifest import PackRef, encode_manifest, encode_page, page_ref
from checkpoint.format.sealed import seal, unseal
from tests.fault.checkpoint_worlds import MIB, QUICK, run_state, same_bits, save_steps

OLDER, NEWEST = 1, 2
_BOMB_BYTES = 2 << 30
_ROOM_BYTES = 768 << 20  # of address space: threads, a restore's budget, and this state many times over

Attack = Callable[[Store, Path], None]


def state_at(step: int) -> dict[str, Any]:
    """Return the state of a step; some of it compresses well."""
    return {**run_state(step), "flat": torch.full((200_000,), float(step))}


def write_run(root: Path, run: str = "run", shift: int = 0) -> Store:
    """Write two steps of a run; another run of the same shapes if it is shifted."""
    store = open_store(str(root))
    with LocalHost(store, arena_bytes=8 * MIB, tuning=QUICK) as host:
        saver = Saver(host, run, SavePolicy(codec=Codec.ZSTD))
        save_steps(saver, {step: state_at(step + shift) for step in (OLDER, NEWEST)})
        saver.close()
    return store


def _edit(store: Store, edit: Callable[[Any], None]) -> None:
    """Change the newest manifest, and seal it anew."""
    key = manifest_key(NEWEST)
    fields = json.loads(bytes(unseal("manifest", store.read(key)[0], key)))
    edit(fields)
    store.put(key, seal("manifest", json.dumps(fields).encode()))


def _own(store: Store) -> list[str]:
    """Return the keys of the packs and pages that the older step does not need."""
    old, new = (
        {*(pack.key for pack in manifest.packs), *(page.key for page in manifest.pages)}
        for manifest in map(Catalog(store).manifest, (OLDER, NEWEST))
    )
    return sorted(new - old)


def _named(kind: str, key: str) -> Attack:
    """Have the manifest name another object."""

    def attack(store: Store, root: Path) -> None:
        def edit(fields: Any) -> None:
            fields[kind][-1]["key"] = key

        _edit(store, edit)

    return attack


def _a_pack_as_a_page(store: Store, root: Path) -> None:
    def edit(fields: Any) -> None:
        fields["pages"][-1]["key"] = fields["packs"][-1]["key"]

    _edit(store, edit)


def _another_run_s(prefix: str) -> Attack:
    """Put what another run has in the place of what the newest step has."""

    def attack(store: Store, root: Path) -> None:
        other = write_run(root.parent / "other", "other", shift=100)
        keys, others = ([key for key in _own(one) if key.startswith(prefix)] for one in (store, other))
        assert keys
        for key, its in zip(keys, others, strict=True):
            store.put(key, bytes(other.read(its)[0]))

    return attack


def _another_step_s_page(store: Store, root: Path) -> None:
    old, new = Catalog(store).manifest(OLDER), Catalog(store).manifest(NEWEST)
    store.put(new.pages[0].key, bytes(store.read(old.pages[0].key)[0]))


def _another_step_s_page_by_name(store: Store, root: Path) -> None:
    old, new = Catalog(store).manifest(OLDER), Catalog(store).manifest(NEWEST)
    store.put(manifest_key(NEWEST), encode_manifest(replace(new, pages=old.pages)))


def _another_step_s_manifest(store: Store, root: Path) -> None:
    store.put(manifest_key(NEWEST), bytes(store.read(manifest_key(OLDER))[0]))


def _a_tensor_of_a_terabyte(store: Store, root: Path) -> None:
    def edit(fields: Any) -> None:
        fields["tensors"][-1]["shape"] = [1 << 38]

    _edit(store, edit)


def _a_skeleton_of_many_storeys(store: Store, root: Path) -> None:
    def edit(fields: Any) -> None:
        nested = json.dumps(fields["skeleton"])
        for _ in range(400):
            nested = f'{{"deeper": {nested}}}'
        fields["skeleton"] = json.loads(nested)

    _edit(store, edit)


def _bomb(frame: Callable[[int], bytes]) -> Attack:
    """Replace a chunk by a frame that grows without end; page and manifest say that all is well."""

    def attack(store: Store, root: Path) -> None:
        manifest = Catalog(store).manifest(NEWEST)
        chunks = list(StoreSource(store).chunks(manifest))
        chosen = max(range(len(chunks)), key=lambda number: chunks[number].box.numel)
        raw_bytes = 4 * chunks[chosen].box.numel
        assert chunks[chosen].codec is Codec.ZSTD
        data, key = frame(raw_bytes), pack_key(9, "mallory", 1)
        store.put(key, data)
        bad = replace(chunks[chosen], pack=len(manifest.packs), offset=0, num_bytes=len(data), base=None)
        page = encode_page([*chunks[:chosen], bad, *chunks[chosen + 1 :]])
        ref = page_ref(page_key(9, NEWEST, "mallory", 1), page, len(chunks))
        store.put(ref.key, page)
        packs = (*manifest.packs, PackRef(key, len(data)))
        store.put(manifest_key(NEWEST), encode_manifest(replace(manifest, packs=packs, pages=(ref,))))

    return attack


def _honest_frame(raw_bytes: int) -> bytes:
    """Return a frame of zeros that says how large they are."""
    zeros = bytes(1 << 24)
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=_BOMB_BYTES)
    return b"".join([*(compressor.compress(zeros) for _ in range(_BOMB_BYTES >> 24)), compressor.flush()])


def _lying_frame(raw_bytes: int) -> bytes:
    """Return one that says that they are as large as the chunk should be."""
    frame = bytearray(_honest_frame(raw_bytes))
    size = _BOMB_BYTES.to_bytes(4, "little")
    place = frame.index(size, 4, 20)
    frame[place : place + 4] = raw_bytes.to_bytes(4, "little")
    return bytes(frame)


def _silent_frame(raw_bytes: int) -> bytes:
    """Return one that does not say."""
    zeros = bytes(1 << 24)
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False).compressobj()
    return b"".join([*(compressor.compress(zeros) for _ in range(_BOMB_BYTES >> 24)), compressor.flush()])


ATTACKS: Mapping[str, Attack] = {
    "a pack outside": _named("packs", "../../../../etc/passwd"),
    "a pack at the root": _named("packs", "/etc/passwd"),
    "a pack in hiding": _named("packs", "packs/.incoming"),
    "a pack elsewhere": _named("packs", "s3://somewhere/else"),
    "a manifest as a pack": _named("packs", "manifests/000000000001"),
    "a page outside": _named("pages", "index/../../../../../etc/passwd"),
    "a pack as a page": _a_pack_as_a_page,
    "another run's pack": _another_run_s("packs/"),
    "another run's page": _another_run_s("index/"),
    "another run's everything": _another_run_s(""),
    "another step's page": _another_step_s_page,
    "another step's page by name": _another_step_s_page_by_name,
    "another step's manifest": _another_step_s_manifest,
    "a tensor of a terabyte": _a_tensor_of_a_terabyte,
    "a skeleton of many storeys": _a_skeleton_of_many_storeys,
    "an honest bomb": _bomb(_honest_frame),
    "a lying bomb": _bomb(_lying_frame),
    "a silent bomb": _bomb(_silent_frame),
}


def main(*roots: str) -> None:
    """Load from each directory with hardly any memory to spare; print what came of it."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM_BYTES, in_use + _ROOM_BYTES))
    for root in roots:
        store, told = open_store(root), []
        for step in (NEWEST, None):
            try:
                loaded = load(store, step)
                is_equal = same_bits(loaded.state, state_at(loaded.manifest.step))
                told.append(f"step {loaded.manifest.step}{'' if is_equal else ' WRONG'}")
            except CheckpointError as error:
                told.append(type(error).__name__)
        print(json.dumps(told))  # noqa: T201 -- the answer


if __name__ == "__main__":
    main(*sys.argv[1:])
