"""A group's values survive what the formula says, bit for bit, in bounded memory; more losses are told."""

import random
import tracemalloc
from collections.abc import Sequence
from itertools import combinations
from math import comb, isclose

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError, Corrupt, PeerLost, StoreError, Unrecoverable
from checkpoint.redundancy.fragment import Fragment, decode_fragment, encode_fragment, share_of, whole_of
from checkpoint.redundancy.groups import Group
from checkpoint.redundancy.parity import forget, offer, protect, recoverable
from checkpoint.redundancy.peers import Place
from checkpoint.redundancy.recovery import Recovery, recover
from checkpoint.redundancy.stripes import Stripes
from tests.memory_peers import MemoryPeers

SNAPSHOT = "000000000042.000007"


def protected(sizes: Sequence[int], num_parity: int, block_bytes: int = 64):
    """Return peers, stripes and values of a group that has protected one snapshot."""
    hosts = tuple(f"h{number}" for number in range(len(sizes)))
    stripes = Stripes(Group(hosts, num_parity), block_bytes)
    random_bytes = random.Random(sum(sizes)).randbytes
    values = {host: random_bytes(size) for host, size in zip(hosts, sizes, strict=True)}
    peers = MemoryPeers(hosts)
    offer_all(peers, stripes, values)
    protect_all(peers, stripes, values)
    return peers, stripes, values


def offer_all(peers: MemoryPeers, stripes: Stripes, values: dict[str, bytes], name: str = SNAPSHOT) -> None:
    for host, value in values.items():
        offer(peers, stripes, host=host, snapshot=name, value=value)


def protect_all(peers: MemoryPeers, stripes: Stripes, values: dict[str, bytes], name: str = SNAPSHOT) -> None:
    for host in values:
        protect(peers, stripes, host=host, snapshot=name)


def recovered(peers, stripes, host: str) -> bytes:
    return bytes(recover(peers, stripes, host=host, snapshot=SNAPSHOT).value)


def without(peers: MemoryPeers, lost: Sequence[str]) -> MemoryPeers:
    """Return the peers as they are once some are lost."""
    left = MemoryPeers([])
    left._memories = {host: dict(kept) for host, kept in peers._memories.items() if host not in lost}
    return left


@settings(max_examples=40)
@given(st.lists(st.integers(0, 150), min_size=2, max_size=6), st.integers(7, 64), st.data())
def test_every_value_comes_back_from_every_set_of_survivors_that_is_large_enough(sizes, block_bytes, data):
    num_parity = data.draw(st.integers(1, min(3, len(sizes) - 1)))
    peers, stripes, values = protected(sizes, num_parity, block_bytes)
    for lost in combinations(values, num_parity):
        left = without(peers, lost)
        assert recoverable(left, stripes) == [SNAPSHOT]
        for host, value in values.items():
            found = recover(left, stripes, host=host, snapshot=SNAPSHOT)
            assert bytes(found.value) == value
            assert found.num_rebuilt_bytes == (len(value) if host in lost else 0)
            assert found.bad == ()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 150), min_size=2, max_size=6), st.integers(7, 64), st.data())
def test_bytes_that_are_rebuilt_quickly_are_the_same_or_the_plain_way_is_left(sizes, block_bytes, data):
    peers, stripes, values = protected(sizes, 1, block_bytes)
    host = data.draw(st.sampled_from(sorted(values)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(values[host]))] * 2)))
    peers.lose(host)
    recovery = Recovery(peers, stripes, host=host, snapshot=SNAPSHOT)
    assert recovery.can_read_quickly
    quick, plain = bytearray(stop - start), bytearray(stop - start)
    try:
        recovery.read_quickly(memoryview(quick), start)
    except PeerLost:
        assert len(set(sizes)) > 1, "rows that are as long are all there"
        recovery.read_into(memoryview(quick), start)
    recovery.read_into(memoryview(plain), start)
    assert quick == plain == values[host][start:stop]


@pytest.mark.parametrize(("num_hosts", "num_parity"), [(3, 1), (5, 1), (4, 2), (5, 3)])
def test_survival_is_what_the_formula_says(num_hosts: int, num_parity: int):
    """REFT: (1-p)^n + n p (1-p)^(n-1) for one parity; in general, at most m of n are lost."""
    peers, stripes, values = protected([200] * num_hosts, num_parity)
    chance = 0.13
    survival = 0.0
    for num_lost in range(num_hosts + 1):
        for lost in combinations(values, num_lost):
            left = without(peers, lost)
            try:
                is_whole = all(recovered(left, stripes, host) == values[host] for host in values)
            except Unrecoverable:
                is_whole = False
            assert is_whole == bool(recoverable(left, stripes))
            survival += is_whole * chance**num_lost * (1 - chance) ** (num_hosts - num_lost)
    formula = sum(
        comb(num_hosts, lost) * chance**lost * (1 - chance) ** (num_hosts - lost)
        for lost in range(num_parity + 1)
    )
    assert isclose(survival, formula)


def test_one_loss_too_many_is_told_with_what_to_do():
    peers, stripes, values = protected([1000, 900, 800, 700], 2)
    for host in ("h0", "h1", "h2"):
        peers.lose(host)
    assert recoverable(peers, stripes) == []
    with pytest.raises(Unrecoverable, match=r"1 good rows are left, 2 are needed; restore from a farther"):
        recovered(peers, stripes, "h1")
    assert recovered(peers, stripes, "h3") == values["h3"], "who is still there has its own"
    peers.lose("h3")
    with pytest.raises(Unrecoverable, match="nothing is left of h3's snapshot"):
        recovered(peers, stripes, "h3")


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_fragment_counts_as_lost_and_is_named(data: st.DataObject):
    peers, stripes, values = protected([300, 250, 0, 177], 2)
    victim = data.draw(st.sampled_from(sorted(values)))
    name = data.draw(st.sampled_from(peers.keys(victim, "parity/")))
    whole = peers._memories[victim][name]
    how = data.draw(st.sampled_from(["flip", "cut", "grow", "swap"]))
    if how == "flip":
        at = data.draw(st.integers(0, len(whole) - 1))
        bad = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    elif how == "cut":
        bad = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif how == "grow":
        bad = whole + b"\0"
    else:
        other = data.draw(st.sampled_from(sorted(set(peers._memories[victim]) - {name})))
        bad = peers._memories[victim][other]
    peers.put(Place(victim, name), [bad])
    others = data.draw(st.permutations([host for host in values if host != victim]))
    for num_lost in (0, 1):
        left = without(peers, others[:num_lost])
        for host, value in values.items():
            found = recover(left, stripes, host=host, snapshot=SNAPSHOT)
            assert bytes(found.value) == value
            assert set(found.bad) <= {name}
    # With one host more gone, what needs those bytes says so; nothing wrong comes back.
    left = without(peers, others[:2])
    for host, value in values.items():
        try:
            assert recovered(left, stripes, host) == value
        except Unrecoverable:
            assert recovered(peers, stripes, host) == value


def test_no_flipped_bit_of_a_fragment_goes_unseen():
    whole = whole_of(b"a value")
    shares = (share_of(whole, b"a va"), share_of(whole, b"lue"))
    data = b"".join(encode_fragment("parity/one:0.2.0", Fragment(shares, b"\x0d\x55\x13a")))
    assert decode_fragment("parity/one:0.2.0", data).shares == shares
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            decode_fragment("parity/one:0.2.0", bad)


def test_a_lost_host_is_replaced_and_the_group_protected_again():
    peers, stripes, values = protected([500, 400, 300], 1)
    peers.lose("h1")
    with pytest.raises(PeerLost, match="h1 is gone, or has not offered"):
        protect(peers, stripes, host="h0", snapshot=SNAPSHOT)
    peers.replace("h1")
    value = recover(peers, stripes, host="h1", snapshot=SNAPSHOT).value
    offer(peers, stripes, host="h1", snapshot=SNAPSHOT, value=value)
    protect(peers, stripes, host="h1", snapshot=SNAPSHOT)
    peers.lose("h2")
    assert recovered(peers, stripes, "h2") == values["h2"]


class Failing(MemoryPeers):
    """Peers that take so many fragments and no more."""

    def __init__(self, hosts: Sequence[str], num_puts: int) -> None:
        super().__init__(hosts)
        self.num_left = num_puts

    def put(self, place, data):
        if not self.num_left:
            raise PeerLost("on purpose")
        self.num_left -= 1
        super().put(place, data)


def test_a_protection_cut_short_anywhere_is_never_taken_for_whole():
    _, stripes, values = protected([500, 400, 300], 1)
    peers = MemoryPeers([])
    for num_puts in range(100):
        peers = Failing(list(values), num_puts)
        try:
            for act in (offer_all, protect_all):
                act(peers, stripes, values)
        except PeerLost:
            for lost in ([], *([host] for host in values)):
                left = without(peers, lost)
                if recoverable(left, stripes):
                    assert all(recovered(left, stripes, host) == values[host] for host in values)
        else:
            break
    assert num_puts > 30
    assert recoverable(peers, stripes) == [SNAPSHOT]


def test_to_forget_a_snapshot_leaves_the_others_alone():
    peers, stripes, values = protected([100, 100, 100], 1)
    for name in ("later", f"{SNAPSHOT}/b", f"{SNAPSHOT}0"):
        offer_all(peers, stripes, values, name)
        protect_all(peers, stripes, values, name)
    forget(peers, stripes, snapshot=SNAPSHOT)
    assert recoverable(peers, stripes) == [f"{SNAPSHOT}/b", f"{SNAPSHOT}0", "later"]
    peers.lose("h0")
    forget(peers, stripes, snapshot="later")
    assert not any("later" in name for host in ("h1", "h2") for name in peers.keys(host, ""))
    with pytest.raises(StoreError, match="is no key"):
        offer(peers, stripes, host="h1", snapshot="../x", value=b"")


def test_two_values_under_one_name_are_never_mixed():
    peers, stripes, values = protected([640, 640, 640], 1)
    old = dict(peers._memories["h1"])
    offer(peers, stripes, host="h1", snapshot=SNAPSHOT, value=b"another" * 91)
    assert recovered(peers, stripes, "h1") == b"another" * 91
    last = stripes.place(SNAPSHOT, stripes.group.stripe_of("h1", 1), 1, 4)
    peers.drop("h1", last.name)  # its parity is of the old value
    with pytest.raises(Unrecoverable):
        recovered(peers, stripes, "h1")
    assert recovered(without(peers, ["h2"]), stripes, "h0") == values["h0"], "what is its own it still has"
    with pytest.raises(Unrecoverable):
        recovered(without(peers, ["h2"]), stripes, "h2")
    peers.put(last, [old[last.name]])  # half the old value, half the new one
    with pytest.raises(Unrecoverable):
        recovered(peers, stripes, "h1")
    with pytest.raises(Corrupt, match="two different values"):
        protect_all(peers, stripes, values)


def test_a_group_keeps_no_more_parity_than_it_needs():
    for num_hosts, num_parity in ((4, 1), (6, 2)):
        peers, _, values = protected([60_000] * num_hosts, num_parity, 5_000)
        kept = sum(len(data) for host in values for data in peers._memories[host].values())
        data = num_hosts * 60_000
        assert kept - data < data * num_parity / (num_hosts - num_parity) + 0.05 * data


@pytest.mark.parametrize("num_parity", [1, 2])
def test_encoding_and_rebuilding_work_in_bounded_memory(num_parity: int):
    """Blocks of 16 KiB of values of 4 MiB: what is in hand at once is a few blocks per host."""
    peers, stripes, values = protected([4 << 20] * 4, num_parity, 16 << 10)
    silent = Silent(peers._memories)
    target = bytearray(4 << 20)
    tracemalloc.start()
    protect(silent, stripes, host="h0", snapshot=SNAPSHOT)
    _, encoding_bytes = tracemalloc.get_traced_memory()
    peers.lose("h0")
    tracemalloc.reset_peak()
    recover(silent, stripes, host="h0", snapshot=SNAPSHOT, allocate=lambda size: target)
    _, rebuilding_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes(target) == values["h0"]
    num_copies = 2 if num_parity == 1 else 5  # the Reed-Solomon library takes and gives copies
    allowed_bytes = num_copies * (len(values) + 1) * (stripes.block_bytes + (8 << 10))
    assert max(encoding_bytes, rebuilding_bytes) < allowed_bytes < 1 << 20


class Silent(MemoryPeers):
    """Peers that give what they have, and forget what they are given."""

    def __init__(self, memories: dict[str, dict[str, bytes]]) -> None:
        super().__init__([])
        self._memories = memories

    def put(self, place, data):
        assert place.peer in self._memories


def test_blocks_hold_something():
    with pytest.raises(CheckpointError, match="hold nothing"):
        Stripes(Group(("a", "b")), 0)
