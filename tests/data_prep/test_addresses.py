"""Sources at addresses: file://, http:// and s3://, through fsspec."""

import gzip
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, read_documents, run_here
from hub_server import in_a_thread

from data_prep.manifest import load_manifest

ROWS = 30
needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="http:// needs aiohttp")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three Parquet files and a gzip file of JSON lines."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = random.Random(7)
    for part in range(3):
        texts = [f"part {part} row {row} {rng.randbytes(500).hex()}" for row in range(ROWS)]
        pq.write_table(pa.table({"text": texts}), folder / f"{part}.parquet", row_group_size=5)
    lines = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(ROWS))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content_of(folder).items() if "data-" in name}


@pytest.fixture
def expected(tmp_path, corpus, small_tokenizer) -> Path:
    """What the Parquet files give when they lie here."""
    run_here("prep", f"{corpus}/*.parquet", *options(small_tokenizer, tmp_path / "expected"))
    return tmp_path / "expected"


def options(tokenizer: Path, out: Path) -> tuple[object, ...]:
    return ("--tokenizer", tokenizer, "--block-size", 16, "--val-fraction", 0.1, "--num-proc", 1, "--out", out)


class FileServer(ThreadingHTTPServer):
    """The files of a folder by HTTP; `failures` maps a name to the statuses to answer first."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.folder, self.failures, self.num_bytes, self.sent = folder, {}, 0, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class FileHandler(BaseHTTPRequestHandler):
    """Answers one request: a range of a file, a file, or a page with links to all."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = unquote(self.path).strip("/").removeprefix("files").strip("/")
        failures = self.server.failures.get(name)
        if failures and self.command == "GET":
            return self._send(failures.pop(0), b"", {"Retry-After": "1"})
        if not name:
            links = "".join(f'<a href="{path.name}">x</a>' for path in sorted(self.server.folder.iterdir()))
            return self._send(200, links.encode(), {"Content-Type": "text/html"})
        path = self.server.folder / name
        if not path.exists():
            return self._send(404, b"", {})
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hash(data)}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        if self.command == "GET":
            self.server.num_bytes += len(data)
            self.server.sent.append(name)
        self._send(status, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def test_an_address_gives_the_blocks_of_the_same_files_here(tmp_path, corpus, expected, small_tokenizer):
    out = tmp_path / "out"
    run_here("prep", f"file://{corpus}/*.parquet", *options(small_tokenizer, out))
    assert shards(out) == shards(expected)
    assert load_manifest(out).settings["sources"][0]["url"] == f"file://{corpus}/*.parquet"
    names = [json.loads(line)["name"] for line in (out / "documents" / "files.jsonl").read_text().splitlines()]
    assert names == ["0.parquet", "1.parquet", "2.parquet"]
    run_here("check", out)
    run_here("prep", f"file://{corpus}:5", *options(small_tokenizer, tmp_path / "capped"))  # a folder, and a cap
    assert load_manifest(tmp_path / "capped").ledger["corpus"]["documents"]["train"] <= 5


def test_an_address_with_nothing_or_without_its_package_is_one_message(tmp_path, fails, small_tokenizer):
    more = options(small_tokenizer, tmp_path / "out")
    assert "no file there" in fails("prep", f"file://{tmp_path}/*.parquet", *more)
    assert "no such file there" in fails("prep", f"file://{tmp_path}/x.parquet", *more)
    assert "addresses with nothing:// need a package" in fails("prep", "nothing://x/y.parquet", *more)
    if importlib.util.find_spec("gcsfs") is None:
        assert "pip install gcsfs" in fails("prep", "gs://bucket/y.parquet", *more)
    assert not (tmp_path / "out").exists()
    message = fails("prep", tmp_path, "--tokenizer", small_tokenizer, "--block-size", 16, "--out", "s3://bucket/x")
    assert "--out is s3://bucket/x but blocks are written to a disk of this machine" in message


@needs_http
def test_http_is_read_in_ranges_and_asked_again(tmp_path, corpus, expected, small_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("data_prep.urls.RANGE_BYTES", 5000)
    monkeypatch.setattr("data_prep.retries.RETRY_WAITS_S", (0.05, 0.05, 0.05))
    with in_a_thread(FileServer(corpus)) as server:
        server.failures = {"1.parquet": [503, 429], "0.parquet": [500]}
        run_here("prep", f"{server.url}/files/*.parquet", *options(small_tokenizer, tmp_path / "out"))
        assert not any(server.failures.values())
        assert shards(tmp_path / "out") == shards(expected)
        run_here("prep", f"{server.url}/files/lines.jsonl.gz", *options(small_tokenizer, tmp_path / "lines"))
        server.num_bytes = 0
        monkeypatch.setattr("data_prep.units.UNIT_BYTES", 1)
        monkeypatch.setattr("data_prep.row_groups.FOOTER_BYTES", 100)  # so that the footers are longer
        run_here(
            "prep",
            f"{server.url}/files/*.parquet:10",
            "--sample",
            "spread",
            *options(small_tokenizer, tmp_path / "spread"),
        )
        assert server.num_bytes < 0.8 * sum(path.stat().st_size for path in corpus.glob("*.parquet"))
    assert "429, next try in" in capsys.readouterr().err
    found = read_documents(tmp_path / "spread", "train") + read_documents(tmp_path / "spread", "validation")
    assert len(found) >= 9


@needs_http
def test_no_finished_file_is_downloaded_again(tmp_path, small_tokenizer, fails):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(4):
        lines = "".join(json.dumps({"text": f"part {part} line {number}"}) + "\n" for number in range(ROWS))
        (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    command = ("prep", "{url}/files/*.gz", *options(small_tokenizer, tmp_path / "out"))
    with in_a_thread(FileServer(folder)) as server:
        command = tuple(str(each).replace("{url}", server.url) for each in command)
        server.failures = {"3.jsonl.gz": [404]}
        fails(*command)
        assert {"0.jsonl.gz", "1.jsonl.gz", "2.jsonl.gz"} <= set(server.sent)
        server.sent.clear()
        run_here(*command)
        assert not {"0.jsonl.gz", "1.jsonl.gz"} & set(server.sent) and "3.jsonl.gz" in server.sent
    assert load_manifest(tmp_path / "out").ledger["files"]["documents"]["read"] == 4 * ROWS


@needs_http
def test_an_address_whose_file_changes_between_kill_and_resume_is_refused(tmp_path, corpus, small_tokenizer, fails):
    with in_a_thread(FileServer(corpus)) as server:
        server.failures = {"2.parquet": [404]}
        command = ("prep", f"{server.url}/files/*.parquet", *options(small_tokenizer, tmp_path / "out"))
        assert "no such file there" in fails(*command)
        pq.write_table(pa.table({"text": ["another text"] * ROWS}), corpus / "2.parquet")
        assert "changed since this preparation listed it" in fails(*command)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("s3fs") is None, reason="s3:// needs s3fs")
def test_s3_gives_the_same_blocks(tmp_path, corpus, expected, small_tokenizer, run_cli):
    moto = os.environ.get("MOTO_SERVER", "moto_server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        server = subprocess.Popen([moto, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        pytest.skip("no moto_server (pip install 'moto[server]'; MOTO_SERVER names another)")
    env = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "NO_PROXY": "127.0.0.1",
    }
    upload = (
        "import s3fs, sys\nfs = s3fs.S3FileSystem()\nfs.mkdir('bucket')\n"
        "[fs.put(path, f'bucket/x/{path.split(chr(47))[-1]}') for path in sys.argv[1:]]"
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        done = run_cli(["-c", upload, *sorted(corpus.glob("*.parquet"))], env=env)
        assert done.code == 0, done.stderr
        done = run_cli(
            ["-m", "data_prep", "prep", "s3://bucket/x/*.parquet", *options(small_tokenizer, tmp_path / "out")], env=env
        )
        assert done.code == 0, done.stderr
    finally:
        server.terminate()
        server.wait()
    assert shards(tmp_path / "out") == shards(expected)
