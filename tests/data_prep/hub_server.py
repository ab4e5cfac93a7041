"""A Hub on this machine, as far as reading a dataset needs one: file lists, downloads, errors."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlparse

Server = TypeVar("Server", bound=ThreadingHTTPServer)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repositories` maps owner/name to its files; `failures` maps a path's end to what to answer first.

    That is a status, "hang" (the headers and half of the bytes, then nothing for a while) or "short" (half of the
    bytes, then the end). A 429 asks to wait a second.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.gated: set[str] = set()
        self.failures: dict[str, list[int | str]] = {}
        self.downloads: Counter = Counter()
        self.num_bytes_sent = 0
        self.asked_at: list[tuple[float, str]] = []  # of GETs of files
        self.now: Callable[[], None] | None = None  # called at each GET of a file

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if self.command == "GET" and "/resolve/" in path:
            self.server.asked_at.append((time.monotonic(), path))
            if self.server.now is not None:
                self.server.now()
        self.failure: str | None = None
        for end, failures in self.server.failures.items():
            if path.endswith(end) and self.command == "GET" and failures:
                failure = failures.pop(0)
                if isinstance(failure, int):
                    return self._send(failure, b"busy", {"Retry-After": "1"} if failure == 429 else {})
                self.failure = failure
        api = path.startswith("/api/datasets/")
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        files = self.server.repositories.get(repository)
        if files is None:
            return self._refuse(404, "RepoNotFound")
        if api and rest[:1] in ([], ["revision"]):
            if rest and rest[1] not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        if api and rest[0] == "tree":
            return self._json(self._tree(files, "/".join(rest[2:])))
        if rest[:1] == ["resolve"]:
            if repository in self.server.gated:
                return self._refuse(403, "GatedRepo")
            return self._file(files, "/".join(rest[2:]))
        return self._refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlparse(self.path).path).removeprefix("/api/datasets/").split("/")
        files = self.server.repositories["/".join(parts[:2])]
        names = parse_qs(body.decode())["paths"]
        entries = [self._entry(files, name) for name in names if name in files]
        folders = [name for name in names if any(file.startswith(f"{name}/") for file in files)]
        self._json(entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders])

    def _tree(self, files: dict[str, bytes], folder: str) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        below = [name for name in files if name.startswith(prefix)]
        is_recursive = "recursive=true" in self.path.lower()
        entries = [self._entry(files, name) for name in below if is_recursive or "/" not in name.removeprefix(prefix)]
        folders = {
            prefix + name.removeprefix(prefix).split("/")[0] for name in below if "/" in name.removeprefix(prefix)
        }
        return entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]

    def _entry(self, files: dict[str, bytes], name: str) -> dict:
        return {"type": "file", "path": name, "oid": hashlib.sha1(files[name]).hexdigest(), "size": len(files[name])}

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.downloads[name] += 1
        etag = hashlib.sha1(files[name]).hexdigest()
        self._send(200, files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and asked is not None and "ETag" in headers:
            start, end = int(asked[1]), int(asked[2] or len(body) - 1) + 1
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
            body = body[start:end]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure is not None:
            body, is_hanging = body[: len(body) // 2], self.failure == "hang"
            self.wfile.write(body)
            self.wfile.flush()
            if is_hanging:
                time.sleep(6)
            self.close_connection = True
            return
        self.wfile.write(body)
        self.server.num_bytes_sent += len(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Run a Hub in a thread."""
    with in_a_thread(Hub(repositories)) as hub:
        yield hub


@contextmanager
def in_a_thread(server: Server) -> Iterator[Server]:
    """Let a server answer until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
