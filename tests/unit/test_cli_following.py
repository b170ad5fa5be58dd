"""Verbs that only ask a store tell how far they are, by what they have read."""

import checkpoint
from flows import stores
from flows.following import Reached
from tests.conversion_samples import adam_state, block_weights, save_state


def test_verify_and_copy_tell_how_much_they_have_read_of_how_much(tmp_path):
    url, other = str(tmp_path / "store"), str(tmp_path / "other")
    save_state(checkpoint.open_store(url), adam_state(block_weights()))
    packs = checkpoint.Catalog(checkpoint.open_store(url)).manifest(3).packs
    for act in (
        lambda tell: stores.verify(url, None, listener=tell),
        lambda tell: stores.copy(url, other, 3, listener=tell),
    ):
        seen: list[Reached] = []
        act(seen.append)
        done = [each.num_done_bytes for each in seen]
        assert done == sorted(done)
        assert sum(pack.num_bytes for pack in packs) <= seen[0].num_bytes
        assert all(each.num_done_bytes <= each.num_bytes for each in seen)
        assert seen[-1].num_done_bytes > 0.9 * seen[0].num_bytes
