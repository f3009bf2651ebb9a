"""Downloads, against a server on this machine: whole, resumed, broken in every way."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tt_fast.data import load as load_module
from tt_fast.data import load_dataset
from tt_fast.data.download import dataset_dir, download, fetch_dataset
from tt_fast.data.hdf5 import write_hdf5
from tt_fast.data.registry import DATASETS

NAME = "hopper-medium-v2"
FILE = "hopper_medium-v2.hdf5"


@dataclass
class Server:
    """What the server answers with, and what it was asked."""

    content: bytes
    status: int | None = None
    """Answer with this status and nothing else."""
    sent_bytes: int | None = None
    """Hang up after so many bytes of the body."""
    knows_ranges: bool = True
    tells_size: bool = True
    tells_total: bool = True
    """Whether a refused range gets the size of the file."""
    hangs: bool = False
    """Answer nothing until the test ends."""
    url: str = ""
    ranges: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


def make_handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            server.ranges.append(wanted)
            if server.hangs:
                server.released.wait(30)
                return
            if server.status is not None:
                self.send_error(server.status)
                return
            start = int(wanted[len("bytes=") : -1]) if wanted and server.knows_ranges else 0
            if start >= len(server.content) and start:
                self.send_response(416)
                if server.tells_total:
                    self.send_header("Content-Range", f"bytes */{len(server.content)}")
                self.end_headers()
                return
            body = server.content[start:]
            self.send_response(206 if start else 200)
            if server.tells_size:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.sent_bytes])

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((2000, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (2000, 3)).astype(np.float32),
        "rewards": np.ones(2000, np.float32),
        "terminals": np.zeros(2000, bool),
        "timeouts": np.zeros(2000, bool),
    }


@pytest.fixture
def server(tmp_path, arrays, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_hdf5(tmp_path / "server" / FILE, arrays, {})
    state = Server((tmp_path / "server" / FILE).read_bytes())
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(state))
    state.url = f"http://127.0.0.1:{httpd.server_port}/{FILE}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.released.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "datasets" / FILE


def fails(server, path, reason):
    """Downloading fails with this reason and says what to do by hand."""
    message = f"{server.url} could not be downloaded: {reason}"
    with pytest.raises(ConnectionError, match=re.escape(message)) as caught:
        download(server.url, path, progress=False, timeout=10.0)
    advice = str(caught.value)
    assert f"save it as {path}; the environment variable D4RL_DATASET_DIR" in advice
    assert not path.exists()
    return advice


def part_of(path):
    return path.with_name(f"{path.name}.part")


def test_whole_file(server, path):
    download(server.url, path, progress=False)
    assert path.read_bytes() == server.content
    assert [file.name for file in path.parent.iterdir()] == [FILE]
    assert server.ranges == [None]


def test_bar_shows_progress(server, path, capsys):
    download(server.url, path)
    assert f"{FILE}: 100%" in capsys.readouterr().err


def test_broken_connection_is_continued_by_range(server, path):
    server.sent_bytes = 1000
    size = f"{len(server.content):,}"
    advice = fails(server, path, f"1,000 of {size} bytes arrived")
    assert "Trying again continues where it stopped." in advice
    assert part_of(path).read_bytes() == server.content[:1000]
    server.sent_bytes = None
    download(server.url, path, progress=False)
    assert path.read_bytes() == server.content
    assert server.ranges == [None, "bytes=1000-"]


def test_server_without_ranges_sends_everything_again(server, path):
    path.parent.mkdir()
    part_of(path).write_bytes(b"x" * 1000)
    server.knows_ranges = False
    download(server.url, path, progress=False)
    assert path.read_bytes() == server.content


def test_whole_part_is_not_downloaded_again(server, path):
    path.parent.mkdir()
    part_of(path).write_bytes(server.content)
    download(server.url, path, progress=False)
    assert path.read_bytes() == server.content
    assert server.ranges == [f"bytes={len(server.content)}-"]


@pytest.mark.parametrize("tells_total", [True, False])
def test_part_longer_than_the_file_is_started_again(server, path, tells_total):
    path.parent.mkdir()
    part_of(path).write_bytes(server.content + b"x")
    server.tells_total = tells_total
    download(server.url, path, progress=False)
    assert path.read_bytes() == server.content
    assert server.ranges == [f"bytes={len(server.content) + 1}-", None]


def test_file_that_the_server_cuts_is_refused_without_a_size(server, path):
    server.tells_size = False
    server.sent_bytes = len(server.content) - 100
    fails(server, path, "what arrived is no HDF5 file")
    assert not part_of(path).exists()


def test_page_instead_of_a_file_is_not_kept(server, path):
    server.content = b"<html>Log in to this network</html>"
    advice = fails(server, path, "what arrived is no HDF5 file")
    assert "Trying again" not in advice
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("status", "text"), [(404, "404 Not Found"), (503, "503 Service")])
def test_dead_link(server, path, status, text):
    server.status = status
    fails(server, path, f"the server answered {text}")


def test_no_network(server, path):
    server.url = "http://127.0.0.1:1/hopper_medium-v2.hdf5"
    fails(server, path, "the server cannot be reached (")


def test_server_that_hangs(server, path):
    server.hangs = True
    with pytest.raises(ConnectionError, match=r"the connection broke \(timed out\)"):
        download(server.url, path, progress=False, timeout=0.2)


def test_name_is_downloaded_once(server, path, arrays, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(path.parent))
    info = replace(DATASETS[NAME], url=server.url)
    monkeypatch.setattr(load_module, "find_dataset", lambda name: info)
    for _ in range(2):
        dataset = load_dataset(NAME)
        assert (dataset.name, dataset.env_id) == (NAME, "Hopper-v4")
        np.testing.assert_array_equal(dataset.observations, arrays["observations"])
    assert server.ranges == [None]


def test_many_at_once_download_once(server, path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(path.parent))
    info = replace(DATASETS[NAME], url=server.url)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch_dataset(info, progress=False), range(4)))
    assert found == [path] * 4
    assert path.read_bytes() == server.content
    assert server.ranges == [None]


def test_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert dataset_dir() == tmp_path
    (tmp_path / FILE).touch()
    assert fetch_dataset(DATASETS[NAME]) == tmp_path / FILE
    monkeypatch.setenv("D4RL_DATASET_DIR", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_dir() == tmp_path / "mine"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert dataset_dir() == tmp_path / ".d4rl" / "datasets"
