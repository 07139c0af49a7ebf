"""Shards over HTTP from a real server that fails, breaks off and stalls."""

import http.server
import itertools
import json
import threading
import time
from pathlib import Path

import fsspec
import pytest

from salad_lightning.data import storage
from salad_lightning.data.format import read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source, expand_shards, shard_paths
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves whole files only; what goes wrong is taken from the server's list, one entry a request."""

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults and self.path.endswith(".tar") else "none"
        lost, afterwards = self.server.lost
        if self.path.endswith(lost):
            # Half of it comes, and from then on it is gone, refused, or nothing comes any more.
            fault = afterwards if self.server.log.count(lost) else "break"
            self.server.log.append(lost)
        self.server.log.append(fault)
        if fault in ("error", "vanish"):
            self.send_error(503 if fault == "error" else 404)
        elif fault in ("break", "stall"):
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(20)
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    folder = save_speech_shards(tmp_path / "speech", num_samples=12, samples_per_shard=4)
    handler = lambda *args: _Handler(*args, directory=str(tmp_path))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.faults, server.log, server.released = [], [], threading.Event()
    server.lost = ("none", "")
    server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}/speech"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def _same(url, path):
    return [(raw.key, raw.members) for raw in read_shard(url)] == [(raw.key, raw.members) for raw in read_shard(path)]


def test_listed_by_folder_pattern_and_braces(server):
    expected = [f"{server.url}/speech-{number:06d}.tar" for number in range(3)]
    for pattern in (server.url, f"{server.url}/*.tar", f"{server.url}/speech-{{000000..000002}}.tar", expected):
        assert shard_paths(Source(pattern, InterleaveDocuments())) == expected
    assert Source(server.url, InterleaveDocuments()).name == "speech"


@pytest.mark.parametrize("faults", [[], ["error"] * 3, ["break", "error", "break"], ["break"] * 5])
def test_reads_on_where_a_connection_broke(server, faults):
    server.faults = list(faults)
    assert _same(f"{server.url}/speech-000001.tar", server.folder / "speech-000001.tar")
    assert server.log[-len(faults) - 1 :] == [*faults, "none"]


def test_a_stalled_connection_is_given_up_and_taken_up_again(server, monkeypatch):
    monkeypatch.setattr(storage, "_STALL_S", 0.5)
    server.faults = ["stall"]
    begin = time.monotonic()
    assert _same(f"{server.url}/speech-000001.tar", server.folder / "speech-000001.tar")
    assert time.monotonic() - begin < 10


def test_after_many_attempts_the_shard_is_an_error(server):
    server.faults = ["error"] * 100
    with pytest.raises(UserError, match=r"503.*tried 6 times"):
        list(read_shard(f"{server.url}/speech-000001.tar"))
    assert server.log == ["error"] * 6


@pytest.mark.parametrize("fault", ["vanish", "error", "stall"])
def test_a_shard_that_is_lost_in_mid_read_is_skipped_from_there(server, make_spec, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(storage, "_STALL_S", 0.2)
    source = Source(server.url, InterleaveDocuments((1, 4), (2, 6)))
    stream = TrainingStream([source], make_spec(), rows_per_batch=2, skipped=tmp_path / "skipped.jsonl")
    server.lost = ("speech-000001.tar", fault)
    keys = {info.key for batch in itertools.islice(stream, 4) for info in batch.documents}
    whole = {f"speech{number:06d}" for number in (*range(4), *range(8, 12))}
    assert whole < keys | {"speech000004"}
    assert "speech000007" not in keys  # it lay behind the break
    (entry,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (entry["shard"], entry["key"]) == (f"{server.url}/speech-000001.tar", "")
    assert "cannot be read" in entry["reason"]


def test_a_missing_shard_is_not_asked_for_again(server):
    with pytest.raises(UserError, match="cannot be read") as caught:
        list(read_shard(f"{server.url}/none.tar"))
    assert caught.value.where == f"{server.url}/none.tar"
    assert len(server.log) == 1


def test_a_reader_that_stops_early_leaves_no_thread(server):
    before = threading.active_count()
    samples = read_shard(f"{server.url}/speech-000001.tar")
    next(samples)
    samples.close()
    deadline = time.monotonic() + 5
    while any(thread.name.endswith("(_run)") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, f"{before} threads before, {threading.enumerate()} now"
        time.sleep(0.05)


def test_a_stream_over_http_is_the_one_from_disk(server, make_spec):
    keys = []
    for shards in (server.url, str(server.folder)):
        stream = EvaluationStream(Source(shards, InterleaveDocuments((1, 4), (2, 6))), make_spec(), rows_per_batch=2)
        keys.append([info.key for batch in stream for info in batch.documents])
    assert keys[0] == keys[1]


def test_any_storage_of_fsspec_serves(tmp_path):
    folder = save_speech_shards(tmp_path / "s", num_samples=4)
    fsspec.filesystem("memory").put(str(folder / "speech-000000.tar"), "/bucket/a/x-0.tar")
    (path,) = shard_paths(Source("memory://bucket/a", InterleaveDocuments()))
    assert _same(path, folder / "speech-000000.tar")
    with pytest.raises(UserError, match="no shard matches"):
        shard_paths(Source("memory://bucket/a/y-*.tar", InterleaveDocuments()))
    with pytest.raises(UserError, match="only local files"):
        expand_shards("memory://bucket/a")


def test_a_missing_package_is_named():
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="s3fs"):
            shard_paths(Source("s3://bucket/train", InterleaveDocuments()))
    else:
        pytest.skip("s3fs is installed")
