"""file:// URLs and paths: one URL means one place to stores and to foreign formats, there and back."""

import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
from checkpoint import Adoption, Change, Emigration, Whereabouts
from checkpoint.errors import StoreRefused
from checkpoint.interop.drafting import check_free
from checkpoint.interop.place import Place, filesystem
from checkpoint.keeper.settings import absolute_url
from checkpoint.store.memory import MemoryStore
from checkpoint.store.open import open_store
from checkpoint.store.paths import file_url, local_path
from checkpoint.store.places import check_apart
from tests.conversion_samples import block_weights, save_state

STRANGE = ["a b", "a%20b", "a%b", "100%", "a?b", "a#b", "a;b", "a+b", "ä", "%25", os.fsdecode(b"\xff")]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_what_is_made_of_a_path_is_that_path_again(name):
    assert local_path(file_url(f"/{name}")) == f"/{name}"


@pytest.mark.parametrize("name", STRANGE)
def test_a_store_is_found_again_by_what_it_is_called(name, tmp_path):
    store = open_store(str(tmp_path / name))
    store.put("k", b"abc")
    assert os.listdir(tmp_path) == [name], "a plain path is taken as it is"
    for url in (str(store), absolute_url(str(tmp_path / name)), absolute_url(str(store))):
        assert bytes(open_store(url).read("k")[0]) == b"abc"
        assert filesystem(url)[1] == str(tmp_path / name)
    with pytest.raises(ValueError, match="same place"):
        check_apart([("one", str(tmp_path / name)), ("other", str(store))])


@pytest.mark.parametrize(
    "url",
    ["file:///x/a%20b", "file://localhost/x/a%20b", "file:/x/a%20b", "obstore+file:///x/a%20b", "/x/a b"],
)
def test_a_url_of_a_file_is_decoded_for_foreign_formats_as_for_stores(url):
    assert filesystem(url)[1] == "/x/a b"
    assert filesystem("/x/a%20b")[1] == "/x/a%20b"


@pytest.mark.parametrize(
    "url", ["file://host/x", "file://", "file://localhost", "file:///x%00y", "file://~/x"]
)
def test_a_url_of_a_file_that_names_no_path_of_this_machine_is_refused(url):
    for use in (open_store, filesystem, lambda url: check_free(url, "a")):
        with pytest.raises(StoreRefused, match=r"write file:///absolute/path"):
            use(url)


def test_a_conversion_there_and_back_meets_every_place_by_its_url(tmp_path):
    base = f"file://{tmp_path}"
    save_state(open_store(f"{base}/s%20x"), {"model": block_weights()})
    store = open_store(f"{base}/r%20x")
    checkpoint.reshard(open_store(f"{base}/s%20x"), store, Change())
    checkpoint.export_foreign(Whereabouts(f"{base}/r%20x"), f"{base}/e%20x", Emigration("hf"))
    checkpoint.import_foreign(f"{base}/e%20x", open_store(f"{base}/i%20x"), Adoption())
    assert sorted(os.listdir(tmp_path)) == ["e x", "i x", "r x", "s x"]
    compared = checkpoint.compare_places(Whereabouts(f"{base}/e%20x"), Whereabouts(str(tmp_path / "i x")))
    assert {one.verdict.value for one in compared} == {"equal"}


def test_a_target_whose_path_has_a_percent_sign_can_be_resharded_into_once_more(tmp_path):
    save_state(open_store(str(tmp_path / "s%20x")), {"model": block_weights()})
    for is_new in (True, False):
        source, target = (open_store(str(tmp_path / name)) for name in ("s%20x", "t%20x"))
        assert checkpoint.reshard(source, target, Change()).is_new is is_new
    assert sorted(os.listdir(tmp_path)) == ["s%20x", "t%20x"]


def test_a_single_file_and_a_folder_below_a_place_are_found_by_their_urls(tmp_path):
    (tmp_path / "a b/100%41").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, tmp_path / "a b/100%41/x y.pt")
    folder = Place(f"file://{tmp_path}/a%20b").below("100%41")
    assert list(pickle.loads(pickle.dumps(folder)).files) == ["x y.pt"]
    store = MemoryStore("s")
    checkpoint.import_foreign(f"file://{tmp_path}/a%20b/100%2541/x%20y.pt", store, Adoption())
    assert set(checkpoint.load(store).state["model"]) == {"w"}
