"""URLs of stores, and what goes along: what is a credential, what is a place, who is asked for a size."""

import uuid
from dataclasses import replace

import fsspec
import pytest

from checkpoint.errors import StoreRefused
from checkpoint.interop.conversion.ruled import choose_rules, knowing
from checkpoint.interop.drafting import drafting
from checkpoint.store.contract import check_url


@pytest.mark.parametrize(
    "url", ["abfs://box@account.dfs.core.windows.net/x", "wasbs://box@account/x", "s3://b/x"]
)
def test_a_container_of_azure_is_a_place(url):
    assert check_url(f"{url}/") == url


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/x", "sftp://user@host/x", "abfs://user:secret@account/x"]
)
def test_a_user_or_a_password_is_a_credential(url):
    with pytest.raises(StoreRefused, match="no credentials"):
        check_url(url)


def test_a_chain_of_clients_takes_its_turns_where_the_files_lie():
    place = f"memory://chained-{uuid.uuid4().hex}/x"
    with drafting(f"simplecache::{place}", "a1") as draft, draft.writing("one") as file:
        file.write(b"1")
    fs, root = fsspec.core.url_to_fs(place)
    assert fs.cat_file(f"{root}/one") == b"1"
    assert [path for path in fs.find(root) if "turns" in path] == []


def test_a_list_in_the_rules_stands_whatever_a_model_is_known_to_have():
    rules = choose_rules("llama-megatron").rules
    listed = replace(rules, sizes={**rules.sizes, "kv_heads": (3, 1)})
    choice = replace(choose_rules("llama-megatron"), rules=listed)
    assert knowing(choice, {"kv_heads": 4, "heads": 8}).sizes == {"heads": 8}
