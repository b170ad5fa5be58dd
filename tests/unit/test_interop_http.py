"""Foreign files behind http(s): a server out of reach is told from a file that it does not have."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from checkpoint.errors import NotFound, StoreUnavailable
from checkpoint.interop.place import Place
from flows.cli import app

pytest.importorskip("aiohttp")


class _Empty(BaseHTTPRequestHandler):
    """Has no file at all."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """Serve nothing, and return the URL of that."""
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _Empty)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_does_not_answer_is_out_of_reach_as_other_places_are(scheme):
    with pytest.raises(StoreUnavailable, match="Cannot connect") as caught:
        _ = Place(f"{scheme}://127.0.0.1:1/x").files  # nobody listens there
    assert type(caught.value) is StoreUnavailable, "it may pass"


def test_a_file_that_a_server_does_not_have_is_not_there(server):
    with pytest.raises(NotFound, match=r"no\.pt is neither a file nor a directory"):
        _ = Place(f"{server}/no.pt").files


def test_the_command_line_says_that_a_server_does_not_answer(tmp_path):
    target = tmp_path / "store"
    done = CliRunner().invoke(app, ["import", "http://127.0.0.1:1/x", str(target), "--json"])
    assert done.exit_code == 1, done.output
    assert "Cannot connect" in done.output and "neither a file" not in done.output
    assert not target.exists()
