"""Keys are made and read back by one room, and nothing that was read leads out of the store."""

import pytest
import torch

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.dtypes import DTYPES, itemsize
from checkpoint.format.keys import (
    PackKey,
    PageKey,
    StepKey,
    abandoned_key,
    check_key,
    expired_key,
    generation_key,
    manifest_key,
    pack_key,
    page_key,
    pages_prefix,
    parse_expired_key,
    parse_generation_key,
    parse_manifest_key,
    parse_pack_key,
    parse_page_key,
    parse_tag_key,
    parse_verified_key,
    score_key,
    tag_key,
    verified_key,
)

LIFE = "0123456789abcdef"


def test_keys_are_as_the_format_says():
    assert manifest_key(20) == "manifests/000000000020"
    assert pack_key(3, "h0", 7, LIFE) == f"packs/000003-h0-{LIFE}-000007"
    assert pack_key(3, "h0", 7) == "packs/000003-h0-000007"
    assert page_key(3, 20, "h0", 1, LIFE) == f"index/000003-000000000020-h0-{LIFE}-0001"
    assert page_key(3, 20, "h0", 1) == "index/000003-000000000020-h0-0001"
    assert generation_key(3) == "control/generations/000003"
    assert page_key(3, 20, "h0", 1).startswith(pages_prefix(3, 20))
    assert abandoned_key(20, "0123456789abcdef0123") == "control/abandoned/000000000020-0123456789abcdef"
    assert expired_key(20, "0123456789abcdef0123") == "control/expired/000000000020-0123456789abcdef"
    assert score_key(20, "0123456789abcdef0123") == "control/scores/000000000020-0123456789abcdef"
    assert tag_key("best") == "control/tags/best"


def test_keys_are_read_back():
    assert parse_manifest_key(manifest_key(20)) == 20
    for life in ("", LIFE):
        assert parse_pack_key(pack_key(3, "h0", 7, life)) == PackKey(3, "h0", 7, life)
        assert parse_page_key(page_key(3, 20, "h0", 1, life)) == PageKey(3, 20, "h0", 1, life)
    assert parse_generation_key(generation_key(3)) == 3
    digest = "0123456789abcdef"
    assert parse_expired_key(expired_key(20, digest)) == StepKey(20, digest)
    assert parse_verified_key(verified_key(20, digest)) == StepKey(20, digest)
    assert parse_tag_key(tag_key("v1.0_final-x")) == "v1.0_final-x"


NO_KEYS = [
    *("", "manifests/20", "manifests/0000000000200", "manifests/00000000002x", "manifests/٠٠٠٠٠٠٠٠٠٠٢٠"),
    *("control/expired/000000000020-XY", "control/scores/20-0123456789abcdef", "control/tags/"),
    *("control/tags/.x", "control/tags/a/b", "tags/a", "000000000020-0123456789abcdef"),
    *("packs/000003-h0-0123-000007", "index/000003-000000000020-h0-0123456789ABCDEF-0001"),
    *("packs/000003-H0-000007", "index/3", "control/generations/000003.tmp", "manifests/000000000020\n"),
]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_such_key_is_none(key: str):
    found = [
        *(parse(key) for parse in (parse_manifest_key, parse_pack_key, parse_page_key)),
        *(parse(key) for parse in (parse_generation_key, parse_expired_key, parse_tag_key)),
        parse_verified_key(key),
    ]
    assert found == [None] * 7


def test_numbers_and_hosts_that_do_not_fit_are_refused():
    for make in (
        lambda: manifest_key(-1),
        lambda: manifest_key(10**12),
        lambda: generation_key(10**6),
        lambda: page_key(0, 0, "h0", 10**4),
        lambda: pack_key(0, "a/b", 0),
        lambda: pack_key(0, "h0", 0, "another"),
        lambda: pack_key(0, "", 0),
        lambda: pack_key(0, "h" * 33, 0),
        lambda: pack_key(0, "Host", 0),
        lambda: tag_key(""),
        lambda: tag_key("../x"),
        lambda: tag_key("x" * 65),
        lambda: expired_key(10**12, "0123456789abcdef"),
    ):
        with pytest.raises(FormatError):
            make()


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "packs/../../x", "packs//x", ".x", "packs/.x", "a\0b", 3, None, "x" * 513],
)
def test_a_key_that_was_read_is_checked(key: object):
    with pytest.raises(Corrupt, match="somewhere"):
        check_key(key, "somewhere")


def test_every_dtype_of_torch_that_has_plain_bits_has_a_name_and_its_size():
    known = {str(getattr(torch, name)).removeprefix("torch.") for name in DTYPES}
    assert known == set(DTYPES)
    for name in DTYPES:
        dtype = getattr(torch, name)
        assert itemsize(name) == dtype.itemsize == DTYPES[name].carrier.itemsize
    plain = {
        str(dtype).removeprefix("torch.")
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
    }
    assert plain - set(DTYPES) == {f"{kind}{n}" for kind in ("int", "uint") for n in range(1, 8)}
