"""A small Hub on localhost: what huggingface_hub needs to create a repository, a branch and a commit, and nothing more.

    with HubStandIn() as hub:
        ... run something with HF_ENDPOINT=hub.url and hub.TOKEN ...
    hub.files("user/name", "main")   # path -> the bytes that arrived

Large files take the LFS way, as on the Hub (content by PUT, then a pointer in the commit); clients must have
HF_HUB_DISABLE_XET=1, because the Xet storage protocol is not spoken here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS_SUFFIXES = (".safetensors", ".bin")


class HubStandIn:
    """The server; use it as a context manager.

    Args:
        refuse_with: answer every request with this status instead.
    """

    TOKEN = "hf_" + "standin" * 5
    USER = "somebody"

    def __init__(self, refuse_with: int | None = None):
        self.refuse_with = refuse_with
        self.repositories: dict[str, dict] = {}  # id -> {"visibility": ..., "branches": {name: {path: bytes}}}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.messages: list[str] = []  # of the commits
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return self.repositories[repo_id]["branches"][branch]

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- what the routes do; each returns (status, object) ----------------------------------------------------------

    def create(self, request: dict) -> tuple[int, dict]:
        repo_id = f"{request.get('organization') or self.USER}/{request['name']}"
        if repo_id in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}
        self.repositories[repo_id] = {"visibility": request.get("visibility"), "branches": {"main": {}}}
        return 200, {"url": f"{self.url}/{repo_id}"}

    def create_branch(self, repo_id: str, branch: str) -> tuple[int, dict]:
        branches = self.repositories[repo_id]["branches"]
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def preupload(self, request: dict) -> tuple[int, dict]:
        modes = {f["path"]: "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular" for f in request["files"]}
        return 200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def lfs_batch(self, request: dict) -> tuple[int, dict]:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.url}/objects/{entry['oid']}"}}}
            for entry in request["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, branch: str, lines: list[dict]) -> tuple[int, dict]:
        branches = self.repositories[repo_id]["branches"]
        if branch not in branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{'0' * 40}", "commitOid": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if self._is_refused():
            return
        if path == "/api/repos/create":
            self._answer(*self.stand_in.create(json.loads(body)))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+/.+)/branch/([^/]+)", path):
            self._answer(*self.stand_in.create_branch(match[1], match[2]))
        elif re.fullmatch(r"/api/models/.+/preupload/[^/]+", path):
            self._answer(*self.stand_in.preupload(json.loads(body)))
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            self._answer(*self.stand_in.lfs_batch(json.loads(body)))
        elif match := re.fullmatch(r"/api/models/(.+/.+)/commit/([^/]+)", path):
            self._answer(*self.stand_in.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()]))
        else:
            self._answer(404, {"error": f"no route {path}"})

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "content does not have the announced sha256"})
            return
        self.stand_in.objects[oid] = body
        self._answer(200, {})

    def do_GET(self) -> None:
        self._body()
        if not self._is_refused():
            self._answer(404, {"error": "Repository not found"})

    def log_message(self, *arguments: object) -> None:
        """Tests read their own output."""

    def _is_refused(self) -> bool:
        hub = self.stand_in
        hub.requests.append(f"{self.command} {self.path}")
        status = hub.refuse_with
        if status is None and self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
            status = 401
        if status is not None:
            self._answer(status, {"error": "refused"})
        return status is not None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
