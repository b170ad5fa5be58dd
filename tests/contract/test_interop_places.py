"""What every place of foreign files promises: on this machine, in memory, and on (an emulated) S3."""

import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from checkpoint.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    Incomplete,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from checkpoint.interop.drafting import check_apart, check_free, drafting
from checkpoint.interop.place import Place, filesystem
from checkpoint.interop.turns import TURNS, Beat
from checkpoint.store.objects import ObjectStore
from tests.contract.s3_suite import BUCKET, credentials

DATA = bytes(range(256)) * 40
NUM_WRITERS = 4
QUICK = Beat(every_s=0.05, silence_s=3.0)
DULL = Beat(every_s=1000.0, silence_s=3.0)


def write_until(root: str, attempt: str, files: Mapping[str, bytes], failing: str, data: bytes) -> None:
    """Write files whole, and then one that fails after some bytes."""
    with drafting(root, attempt) as draft:
        for name, content in files.items():
            with draft.writing(name) as file:
                file.write(content)
        with draft.writing(failing) as file:
            file.write(data)
            raise ZeroDivisionError


class PlaceContract:
    """Inherit this with a fixture `root`: the URL of a directory that is not there yet."""

    tells_changes = True

    @pytest.fixture
    def written(self, root: str) -> str:
        with drafting(root, "a1") as draft:
            assert draft.kept == frozenset()
            with draft.writing("one.bin") as file:
                file.write(DATA)
            with draft.writing("deeper/two.bin") as file:
                file.write(b"")
        return root

    def test_what_was_written_is_listed_with_its_sizes(self, written):
        assert dict(Place(written).files) == {"one.bin": len(DATA), "deeper/two.bin": 0}

    def test_ranges_are_read_as_bytes_and_into_arrays(self, written):
        place = Place(written)
        assert place.read("one.bin") == DATA and place.read("one.bin", 100) == DATA[100:]
        assert place.read("one.bin", 7, 13) == DATA[7:20] and place.read("one.bin", 7, 0) == b""
        assert place.read("deeper/two.bin") == b""
        out = np.zeros((5, 3), np.uint16)
        place.read_into("one.bin", 1001, out)
        assert out.tobytes() == DATA[1001:1031]

    def test_a_file_is_opened_for_reading_at_any_position(self, written):
        with Place(written).open("one.bin") as file:
            file.seek(300)
            assert file.read(10) == DATA[300:310]

    def test_a_range_beyond_the_end_is_said_to_be_cut_short(self, written):
        for offset, num_bytes in ((0, len(DATA) + 1), (len(DATA), 1), (-1, 1), (3, -1)):
            with pytest.raises(Corrupt, match=r"one\.bin"):
                Place(written).read("one.bin", offset, num_bytes)
        with pytest.raises(Corrupt, match=r"one\.bin"):
            Place(written).read_into("one.bin", len(DATA) - 3, np.zeros(4, np.uint8))

    def test_a_url_of_a_single_file_is_a_directory_of_one(self, written):
        place = Place(f"{written}/one.bin")
        assert dict(place.files) == {"one.bin": len(DATA)} and place.read("one.bin", 1, 2) == DATA[1:3]

    def test_what_is_not_there_is_said_to_be_missing(self, root, written):
        with pytest.raises(NotFound, match=r"three\.bin"):
            Place(written).read("three.bin")
        with pytest.raises(NotFound):
            _ = Place(f"{root}-elsewhere").files

    def test_a_pickled_place_is_its_url(self, written):
        place = Place(written)
        _ = place.files
        assert pickle.loads(pickle.dumps(place)).read("one.bin", 0, 3) == DATA[:3]

    def test_nothing_that_is_there_is_overwritten(self, written):
        with pytest.raises(AlreadyExists, match="nothing is overwritten"), drafting(written, "a1"):
            raise AssertionError("it was let in")

    def test_a_file_whose_writing_fails_is_not_there_and_the_others_are_kept_for_the_same_attempt(self, root):
        with pytest.raises(ZeroDivisionError):
            write_until(root, "a1", {"done.bin": b"done"}, "failed.bin", b"half of it")
        with pytest.raises((NotFound, Incomplete)):
            _ = Place(root).files
        with drafting(root, "a1") as draft:
            assert draft.kept == {"done.bin"}
            with draft.writing("failed.bin") as file:
                file.write(b"all of it")
        assert dict(Place(root).files) == {"done.bin": 4, "failed.bin": 9}

    def test_of_many_who_begin_at_once_one_writes_and_the_others_are_told_so(self, root):
        def write(number: int) -> str:
            try:
                with drafting(root, "same", QUICK) as draft:
                    with draft.writing("x") as file:
                        file.write(b"x")
                    others.wait()
                    return "wrote"
            except (Conflict, AlreadyExists):
                return "was told"
            finally:
                done.append(number)
                if len(done) == NUM_WRITERS - 1:
                    others.set()

        done: list[int] = []
        others = threading.Event()
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            told = list(pool.map(write, range(NUM_WRITERS)))
        assert sorted(told) == ["was told"] * (NUM_WRITERS - 1) + ["wrote"]
        assert dict(Place(root).files) == {"x": 1}

    @pytest.mark.parametrize("inner", ["packs/out", "index/a/b", "control", "manifests"])
    def test_nothing_is_put_among_a_store_s_objects(self, root, inner):
        fs, path = filesystem(root)
        fs.makedirs(f"{path}/manifests", exist_ok=True)
        fs.pipe_file(f"{path}/manifests/{3:012d}", b"one")
        for act in (
            lambda url: drafting(url, "a1").__enter__(),
            lambda url: check_free(url, "a1"),
            check_apart,
        ):
            with pytest.raises(StoreRefused, match="lies within the store"):
                act(f"{root}/{inner}")
        check_apart(f"{root}/other/out")

    def test_a_file_that_becomes_another_while_it_is_read_is_told(self, written):
        if not self.tells_changes:
            pytest.skip("nothing there tells that a file was replaced")
        fs, path = filesystem(written)
        for url, data in ((written, DATA[::-1]), (f"{written}/one.bin", DATA)):
            place = Place(url)
            assert place.read("one.bin", 0, 3) == data[-3:][::-1]
            place.settle()
            time.sleep(0.02)  # a clock may be no finer
            fs.pipe_file(f"{path}/one.bin", data)
            with pytest.raises(Corrupt, match=r"one\.bin.* was changed while it was being read"):
                place.settle()

    def test_an_attempt_has_a_plain_name(self, root):
        for attempt in ("", "../x", "a b", "x" * 65):
            with pytest.raises(StoreRefused, match="attempt"), drafting(root, attempt):
                raise AssertionError("it was let in")


class FarContract(PlaceContract):
    """What is promised behind a URL, where no kernel tells who lives."""

    @pytest.mark.parametrize("attempt", ["mine", "another"])
    def test_a_second_writer_is_told_so_and_leaves_no_trace(self, root, attempt):
        with drafting(root, "mine", QUICK) as draft:
            with pytest.raises(Conflict, match="just writing"), drafting(root, attempt, QUICK):
                raise AssertionError("it was let in")
            with draft.writing("x") as file:
                file.write(b"x")
        assert not ObjectStore(f"{root}/{TURNS}").list("")

    def test_a_writer_that_was_silent_for_too_long_is_succeeded_and_told_so(self, root):
        turn = drafting(root, "same", DULL)
        late = turn.__enter__()
        with late.writing("one") as file:
            file.write(b"one")
        with drafting(root, "same", QUICK) as draft:
            assert draft.kept == {"one"}
            with draft.writing("two") as file:
                file.write(b"two")
        with pytest.raises(Conflict, match="went on with"), late.writing("two"):
            raise AssertionError("it was let in")
        with pytest.raises(Conflict, match="went on with"):
            turn.__exit__(None, None, None)
        assert dict(Place(root).files) == {"one": 3, "two": 3}
        assert Place(root).read("two") == b"two"

    def test_a_writer_that_was_succeeded_cannot_finish(self, root):
        late = drafting(root, "same", DULL)
        late.__enter__()
        with drafting(root, "same", QUICK) as draft:
            with pytest.raises(Conflict, match="went on with"):
                late.__exit__(None, None, None)
            with pytest.raises(Incomplete):
                _ = Place(root).files
            with draft.writing("x") as file:
                file.write(b"x")
        assert dict(Place(root).files) == {"x": 1}

    def test_a_late_writer_does_not_take_a_later_turn_of_its_number_for_its_own(self, root):
        late = drafting(root, "same", DULL)
        late.__enter__()
        with pytest.raises(ZeroDivisionError), drafting(root, "same", QUICK):
            raise ZeroDivisionError
        with drafting(root, "same", QUICK) as draft:
            with pytest.raises(Conflict, match="went on with"):
                late.__exit__(None, None, None)
            with draft.writing("x") as file:
                file.write(b"x")
        assert dict(Place(root).files) == {"x": 1}

    def test_what_another_attempt_left_unfinished_is_not_overwritten(self, root):
        with pytest.raises(ZeroDivisionError):
            write_until(root, "old", {"one": b"1"}, "two", b"")
        with pytest.raises(AlreadyExists, match="did not finish"), drafting(root, "new", QUICK):
            raise AssertionError("it was let in")

    def test_what_a_kill_leaves_of_a_turn_does_not_spoil_what_was_finished(self, written):
        ObjectStore(f"{written}/{TURNS}").put("000007", b"killed")
        assert dict(Place(written).files) == {"one.bin": len(DATA), "deeper/two.bin": 0}


class TestHere(PlaceContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return str(tmp_path / "out [1]")

    def test_a_file_url_is_a_path(self, written):
        assert Place(f"file://{written}").read("one.bin", 0, 4) == DATA[:4]

    def test_a_file_that_shrinks_while_it_is_read_is_said_to_be_cut_short(self, written):
        place = Place(written)
        _ = place.files
        os.truncate(f"{written}/one.bin", 100)
        with pytest.raises(Corrupt, match="cut short"):
            place.read("one.bin", 0, 200)

    def test_links_are_followed_and_a_broken_one_is_missing(self, written, tmp_path):
        links = tmp_path / "links"
        links.mkdir()
        (links / "model.bin").symlink_to(f"{written}/one.bin")
        assert Place(str(links)).read("model.bin", 5, 5) == DATA[5:10]
        (links / "gone.bin").symlink_to(f"{written}/nowhere.bin")
        with pytest.raises((NotFound, Corrupt)):
            Place(str(links)).read("gone.bin", 0, 5)

    def test_drafts_of_other_attempts_are_removed_and_nothing_else(self, root, tmp_path):
        for attempt in ("old", "new"):
            with pytest.raises(ZeroDivisionError):
                write_until(root, attempt, {"one.bin": attempt.encode()}, "two.bin", b"")
        (tmp_path / "other.holdfast-draft-old").mkdir()
        with drafting(root, "new") as draft:
            assert draft.kept == {"one.bin"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other.holdfast-draft-old", "out [1]"]
        assert Place(root).read("one.bin") == b"new"

    @pytest.mark.parametrize("attempt", ["mine", "another"])
    def test_while_one_writes_no_other_takes_its_draft_away(self, root, tmp_path, attempt):
        with drafting(root, "mine") as draft:
            with draft.writing("x") as file:
                file.write(b"x")
            with pytest.raises(Conflict, match="just writing"), drafting(root, attempt):
                raise AssertionError("it was let in")
            assert [path.name for path in tmp_path.iterdir()] == ["out [1].holdfast-draft-mine"]
        assert Place(root).read("x") == b"x"

    def test_whoever_is_killed_lets_go_of_the_draft(self, root):
        program = (
            "import sys\nfrom checkpoint.interop.drafting import drafting\n"
            f"with drafting({root!r}, 'mine'):\n    print('in', flush=True)\n    sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"in\n"
            with pytest.raises(Conflict), drafting(root, "another"):
                raise AssertionError("it was let in")
            child.kill()
        with drafting(root, "another") as draft:
            assert not draft.kept

    def test_an_empty_directory_may_be_written_to(self, root):
        Path(root).mkdir()
        with drafting(root, "a1") as draft, draft.writing("x") as file:
            file.write(b"x")
        assert dict(Place(root).files) == {"x": 1}

    def test_until_the_end_nothing_is_where_a_reader_would_look(self, root):
        with drafting(root, "a1") as draft:
            with draft.writing("x") as file:
                file.write(b"x")
            assert not Path(root).exists()


class TestMemory(FarContract):
    tells_changes = False

    @pytest.fixture
    def root(self) -> Iterator[str]:
        name = f"memory://{uuid.uuid4().hex}/out"
        yield name
        memory = fsspec.filesystem("memory")
        if memory.exists(name.rpartition("/")[0]):
            memory.rm(name.rpartition("/")[0], recursive=True)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with credentials(f"http://{host}:{port}", "holdfast-test", "not-a-secret"):
        yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.slow
class TestS3(FarContract):
    @pytest.fixture
    def root(self, endpoint: str) -> str:
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/out"

    def test_whoever_is_killed_lets_go_of_the_draft_once_it_was_silent_for_long(self, root):
        program = (
            "import sys\nfrom checkpoint.interop.drafting import drafting\n"
            "from checkpoint.interop.turns import Beat\n"
            f"with drafting({root!r}, 'mine', Beat(0.05, 3.0)) as draft:\n"
            "    with draft.writing('one') as file:\n        file.write(b'1')\n"
            "    print('in', flush=True)\n    sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"in\n"
            with pytest.raises(Conflict), drafting(root, "mine", QUICK):
                raise AssertionError("it was let in")
            child.kill()
        with drafting(root, "mine", QUICK) as draft:
            assert draft.kept == {"one"}
        assert dict(Place(root).files) == {"one": 1}

    def test_a_large_file_goes_in_parts_and_an_abandoned_one_leaves_none(self, root):
        with pytest.raises(ZeroDivisionError):
            write_until(root, "a1", {}, "big", bytes(60 << 20))
        with drafting(root, "a1") as draft:
            assert draft.kept == frozenset()
            with draft.writing("big") as file:
                for number in range(2):
                    file.write(bytes([number]) * (30 << 20))
        place = Place(root)
        assert place.files["big"] == 60 << 20 and place.read("big", (30 << 20) - 1, 2) == b"\0\1"

    def test_the_url_of_the_other_client_means_the_same_place(self, written):
        assert Place(f"obstore+{written}").read("one.bin", 0, 3) == DATA[:3]


@pytest.mark.parametrize(
    ("url", "error"), [("", StoreRefused), ("nosuch://x/y", StoreRefused), ("/nowhere/at/all", NotFound)]
)
def test_a_url_that_leads_nowhere_is_refused(url: str, error: type[Exception]):
    with pytest.raises(error):
        _ = Place(url).files


def test_errors_while_a_file_is_written_say_which(tmp_path: Path):
    def write(read: Callable[[], bytes]) -> None:
        with drafting(str(tmp_path / "out"), "a1") as draft, draft.writing("x.bin") as file:
            file.write(read())

    with pytest.raises(StoreUnavailable, match=r"x\.bin"):
        write(lambda: 3)  # type: ignore[return-value,arg-type]  # as a client that breaks would
