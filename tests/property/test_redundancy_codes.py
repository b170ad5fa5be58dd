"""Codes and groups: every pattern of losses is rebuilt bit for bit, no group meets a domain twice."""

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError, Unrecoverable
from checkpoint.redundancy import codes
from checkpoint.redundancy.codes import ReedSolomon, Xor, code_of
from checkpoint.redundancy.groups import Group, form_groups

STEP = 256 << 10
lengths = st.one_of(st.just(0), st.integers(1, 100), st.sampled_from([STEP - 1, STEP, STEP + 17]))


def prove(code: codes.Code, pieces: list[bytes], num_parity: int) -> None:
    """Lose every set of up to m rows, and get each lost piece back."""
    parities = code.encode(pieces)
    assert len(parities) == num_parity
    assert all(memoryview(parity).nbytes >= max(map(len, pieces)) for parity in parities)
    rows = dict(enumerate([*pieces, *parities]))
    for num_lost in range(num_parity + 1):
        for lost in combinations(rows, num_lost):
            present = {row: data for row, data in reversed(rows.items()) if row not in lost}
            wanted = {row: len(pieces[row]) for row in lost if row < len(pieces)}
            found = code.rebuild(present, wanted)
            assert {row: bytes(data) for row, data in found.items()} == {row: pieces[row] for row in wanted}
    for lost in combinations(rows, num_parity + 1):
        present = {row: data for row, data in rows.items() if row not in lost}
        with pytest.raises(Unrecoverable, match="restore from a farther tier"):
            code.rebuild(present, {lost[0]: 1})


@settings(max_examples=40)
@given(st.lists(lengths, min_size=2, max_size=6), st.integers(1, 3), st.integers(0, 2**32))
def test_every_pattern_of_so_many_losses_is_rebuilt_bit_for_bit(sizes: list[int], num_parity: int, seed: int):
    random_bytes = random.Random(seed).randbytes
    prove(code_of(len(sizes), num_parity), [random_bytes(size) for size in sizes], num_parity)


@pytest.mark.parametrize("num_data", range(1, 7))
@pytest.mark.parametrize("num_parity", range(1, 4))
@pytest.mark.parametrize("backend", ["isa_l_rs_cauchy", "liberasurecode_rs_vand"])
def test_both_reed_solomons_hold_for_every_shape_of_group(num_data, num_parity, backend, monkeypatch):
    monkeypatch.setattr(codes, "_backend", lambda: backend)
    random_bytes = random.Random(num_data).randbytes
    sizes = [0, 1, 333, 64, 5, 64][:num_data]
    prove(ReedSolomon(num_data, num_parity), [random_bytes(size) for size in sizes], num_parity)


def test_one_parity_is_an_exclusive_or_and_more_is_reed_solomon():
    assert isinstance(code_of(4, 1), Xor)
    assert isinstance(code_of(4, 2), ReedSolomon)
    assert bytes(Xor(2).encode([b"\x0f\x01", b"\xf0"])[0]) == b"\xff\x01"
    assert bytes(Xor(2).rebuild({1: b"", 2: b"\x0f"}, {0: 3})[0]) == b"\x0f\x00\x00"


def test_without_any_reed_solomon_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(codes, "VALID_EC_TYPES", ["flat_xor_hd_3"])
    codes._backend.cache_clear()
    with pytest.raises(CheckpointError, match="use one parity"):
        code_of(4, 2)
    codes._backend.cache_clear()


@given(st.integers(2, 32), st.data())
def test_parity_rotates_and_nobody_keeps_parity_of_its_own_data(num_hosts: int, data: st.DataObject):
    num_parity = data.draw(st.integers(1, num_hosts - 1))
    group = Group(tuple(f"h{number}" for number in range(num_hosts)), num_parity)
    num_kept: Counter[str] = Counter()
    for stripe in range(num_hosts):
        holders = [group.holder(stripe, row) for row in range(num_hosts)]
        assert sorted(holders) == sorted(group.hosts), "one row of every stripe on every host"
        assert holders[group.num_data] == group.hosts[stripe], "who encodes it keeps its first parity"
        assert all(group.stripe_of(host, row) == stripe for row, host in enumerate(holders[: group.num_data]))
        num_kept.update(holders[group.num_data :])
    assert set(num_kept.values()) == {num_parity}
    for host in group.hosts:
        own = {group.stripe_of(host, row) for row in range(group.num_data)}
        assert len(own) == group.num_data, "each piece is in a stripe of its own"
        assert group.own_stripe(host) not in own


domains = st.lists(st.integers(1, 7), max_size=9)


@given(domains, st.integers(2, 9), st.data())
def test_no_group_meets_a_failure_domain_twice(populations: list[int], size: int, data: st.DataObject):
    num_parity = data.draw(st.integers(1, size - 1))
    domain_of = {f"h{h}-{d}": f"d{d}" for d, count in enumerate(populations) for h in range(count)}
    shuffled = dict(data.draw(st.permutations(sorted(domain_of.items()))))
    found = form_groups(shuffled, group_size=size, num_parity=num_parity)
    grouped = [host for group in found.groups for host in group.hosts]
    assert sorted([*grouped, *found.unprotected]) == sorted(domain_of)
    for group in found.groups:
        assert num_parity < len(group.hosts)
        assert len({domain_of[host] for host in group.hosts}) == len(group.hosts)
    sizes = [len(group.hosts) for group in found.groups]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert not sizes or max(sizes) <= size or min(sizes) < 2 * (num_parity + 1)
    assert found == form_groups(domain_of, group_size=size, num_parity=num_parity)
    if set(populations) == {1} and len(populations) > num_parity:
        assert found.unprotected == (), "with a domain each, nobody is left out"


def test_a_domain_that_is_too_full_leaves_some_unprotected_and_says_whom():
    domain_of = {"a1": "a", "a2": "a", "a3": "a", "b1": "b"}
    found = form_groups(domain_of, group_size=4, num_parity=1)
    assert [set(group.hosts) for group in found.groups] == [{"a1", "b1"}]
    assert found.unprotected == ("a2", "a3")
    assert form_groups({}, group_size=3).groups == ()


@pytest.mark.parametrize(
    ("hosts", "num_parity"),
    [((), 1), (("a",), 1), (("a", "b"), 0), (("a", "b"), 2), (tuple(f"h{n}" for n in range(33)), 1)],
)
def test_a_group_that_could_not_rebuild_is_refused(hosts: tuple[str, ...], num_parity: int):
    with pytest.raises(CheckpointError, match="cannot make up"):
        Group(hosts, num_parity)


def test_a_group_knows_its_hosts_once_each():
    with pytest.raises(CheckpointError, match="twice"):
        Group(("a", "b", "a"), 1)
    with pytest.raises(CheckpointError, match="c is not in the parity group of a, b"):
        Group(("a", "b"), 1).own_stripe("c")
