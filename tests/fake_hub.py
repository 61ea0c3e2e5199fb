"""A small Hugging Face Hub on loopback, so that pushing and pulling are tested offline with the real client.

It speaks the part of the Hub's HTTP interface that ``huggingface_hub`` uses for model repositories: create, branch,
preupload, commit, info, tree and resolve with byte ranges. Files are "regular", so that their contents lie within the
commit; with ``lfs=True`` weights are uploaded by themselves before it (Git LFS, in one part; no Xet). Anything else is
answered 501 with the path in the message, so that a test fails on the missing route and not somewhere later.

``huggingface_hub`` reads ``HF_ENDPOINT`` when it is imported. A test therefore runs the client in a subprocess::

    with FakeHub() as hub:
        subprocess.run([sys.executable, "push.py"], env={**os.environ, **hub.environment(tmp_path / "hf")}, check=True)
        assert "config.json" in hub.files("me/model")
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "me"
TOKEN = "hf_test"


@dataclass(frozen=True)
class Request:
    """One line of the request log. ``path`` is unquoted; ``body_bytes`` counts the response's body."""

    method: str
    path: str
    byte_range: str | None
    status: int
    body_bytes: int


class HubError(Exception):
    """A refusal. ``code`` becomes ``X-Error-Code``, from which the client chooses the exception that it raises."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        ascii_message = message.encode("ascii", "backslashreplace").decode()  # a header carries nothing else safely
        self.headers = {"X-Error-Message": ascii_message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Commit:
    """An immutable listing of a repository: file path to blob id."""

    sha: str
    files: dict[str, str]
    message: str
    date: str


@dataclass
class Repository:
    """Commits and the branches that point at them. File contents lie in the hub's shared blob folder."""

    repo_id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit that a branch or a full sha names."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, files: dict[str, str], message: str, branch: str = "main") -> Commit:
        """Put a new commit on a branch. The sha covers the commit's number, so that equal listings get new ones."""
        seed = [self.repo_id, len(self.commits), self.branches.get(branch), message, sorted(files.items())]
        sha = hashlib.sha1(json.dumps(seed).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[sha] = Commit(sha, dict(files), message, date)
        self.branches[branch] = sha
        return self.commits[sha]


class BlobStore:
    """File contents in a folder, named as git names them: the client skips uploads whose git hash is already there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, content: bytes) -> str:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self._folder / oid).write_bytes(content)
        return oid

    def read(self, oid: str, start: int = 0, length: int = -1) -> bytes:
        with (self._folder / oid).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def size(self, oid: str) -> int:
        return (self._folder / oid).stat().st_size


@dataclass(frozen=True)
class _Call:
    """What a route needs of an HTTP request."""

    method: str
    query: dict[str, list[str]]
    token: str | None
    byte_range: str | None
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        """Whether a query parameter is switched on, in any of the spellings that the client uses."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class _Reply:
    """An HTTP response. ``size`` stands in for the body's length where the body is not sent (HEAD)."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    size: int | None = None


def _json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> _Reply:
    return _Reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open byte span that a Range header asks for, or None to send everything.

    HTTP lets a server ignore what it does not understand; several spans in one header are ignored here.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


class _Api:
    """The Hub's routes, from a parsed call to a reply, without sockets. Not thread-safe: FakeHub holds a lock."""

    def __init__(self, endpoint: str, blobs: BlobStore, require_token: bool, lfs: bool) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs = blobs
        self.uploads: dict[str, str] = {}  # sha256 of what came by itself, to blob id
        self.on_upload: Callable[[], None] = lambda: None
        self._endpoint = endpoint
        self._require_token = require_token
        self._lfs = lfs

    def answer(self, path: str, call: _Call) -> _Reply:
        """Find the route of a still-quoted path and run it; refusals become replies."""
        try:
            self._check_token(call, required=self._require_token or call.method == "POST")
            for method, pattern, route in _ROUTES:
                match = pattern.fullmatch(path)
                if match and call.method in (method, "HEAD" if method == "GET" else method):
                    groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    return route(self, call, **groups)
            raise HubError(501, f"the fake hub has no route for {call.method} {path}")
        except HubError as error:
            return _json_reply({"error": str(error)}, error.status, error.headers)

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A repository with one empty commit, as revisions of an unborn branch could not be resolved."""
        repository = self.repositories[repo_id] = Repository(repo_id, private)
        repository.commit({}, "initial commit")
        return repository

    def find(self, call: _Call, repo_id: str) -> Repository:
        """The repository, if the caller may see it."""
        repository = self.repositories.get(repo_id)
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repository.private:
            self._check_token(call, required=True, code="RepoNotFound")
        return repository

    def whoami(self, call: _Call) -> _Reply:
        self._check_token(call, required=True)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return _json_reply({"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self, call: _Call) -> _Reply:
        return _json_reply({"errors": [], "warnings": []})

    def create_repo(self, call: _Call) -> _Reply:
        body = call.json()
        if body.get("type", "model") != "model":
            raise HubError(501, f"the fake hub holds models, not repositories of type {body['type']}")
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        value = {"name": repo_id, "url": f"{self._endpoint}/{repo_id}"}
        if repo_id in self.repositories:  # the client reads "url" from this refusal where exist_ok is given
            return _json_reply({**value, "error": "You already created this model repo"}, 409)
        self.create(repo_id, private=body.get("visibility") == "private" or bool(body.get("private")))
        return _json_reply(value)

    def create_branch(self, call: _Call, repo_id: str, revision: str) -> _Reply:
        repository = self.find(call, repo_id)
        if revision in repository.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repository.branches[revision] = repository.find(call.json().get("startingPoint", "main")).sha
        return _json_reply({}, 201)

    def preupload(self, call: _Call, repo_id: str, revision: str) -> _Reply:
        """Contents of 'regular' files come inside the commit. A known ``oid`` lets the client skip a file."""
        commit = self.find(call, repo_id).find(revision)
        answers = []
        for path in (entry["path"] for entry in call.json()["files"]):
            large = self._lfs and path.endswith(".safetensors")
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({"path": path, "oid": commit.files.get(path), **mode})
        return _json_reply({"files": answers})

    def lfs_batch(self, call: _Call, repo_id: str) -> _Reply:
        """Where to put large files; no place for those that are here already."""
        self.find(call, repo_id)
        objects: list[dict[str, Any]] = []
        for wanted in call.json()["objects"]:
            place = {"upload": {"href": f"{self._endpoint}/uploads/{wanted['oid']}"}}
            missing = wanted["oid"] not in self.uploads
            objects.append({**wanted, **({"actions": place} if missing else {})})
        return _json_reply({"transfer": "basic", "objects": objects})

    def upload(self, call: _Call, oid: str) -> _Reply:
        """Take a large file. No token: the real Hub's places are signed."""
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "the content is not what its sha256 says")
        self.uploads[oid] = self.blobs.write(call.body)
        self.on_upload()
        return _Reply(200, {})

    def commit(self, call: _Call, repo_id: str, revision: str) -> _Reply:
        """Apply a commit sent as one JSON object a line: a header, then the changes in order."""
        repository = self.find(call, repo_id)
        head = repository.find(revision)
        if revision not in repository.branches:
            raise HubError(501, "the fake hub commits to branches only")
        lines = [json.loads(line) for line in call.body.splitlines() if line]
        header, changes = lines[0]["value"], lines[1:]
        if not head.sha.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            self._apply(files, change["key"], change["value"])
        reply = {"success": True, "hookOutput": ""}
        if call.flag("create_pr"):  # the proposed commit is on a branch of its own
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            revision = f"refs/pr/{number}"
            reply["pullRequestUrl"] = f"{self._endpoint}/{repo_id}/discussions/{number}"
        sha = repository.commit(files, header["summary"], revision).sha
        return _json_reply({**reply, "commitOid": sha, "commitUrl": f"{self._endpoint}/{repo_id}/commit/{sha}"})

    def info(self, call: _Call, repo_id: str, revision: str = "main") -> _Reply:
        repository = self.find(call, repo_id)
        commit = repository.find(revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if call.flag("blobs"):
            for entry in siblings:
                oid = commit.files[entry["rfilename"]]
                entry.update(blobId=oid, size=self.blobs.size(oid))
        names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit.sha}
        state = {"private": repository.private, "gated": False, "disabled": False, "lastModified": commit.date}
        return _json_reply({**names, **state, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, call: _Call, repo_id: str, revision: str, path: str) -> _Reply:
        """Files and folders under ``path``, in one page; without ``recursive``, only those directly in it."""
        commit = self.find(call, repo_id).find(revision)
        prefix = f"{path}/" if path else ""
        inside = sorted(name for name in commit.files if name.startswith(prefix))
        if path and not inside:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        entries: dict[str, dict[str, Any]] = {}
        for name in inside:
            folders = name.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                folder = prefix + "/".join(folders[:depth])
                oid = hashlib.sha1(f"tree {commit.sha} {folder}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            oid = commit.files[name]
            entries[name] = {"type": "file", "oid": oid, "size": self.blobs.size(oid), "path": name}
        if not call.flag("recursive"):
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(prefix)}
        return _json_reply(list(entries.values()))

    def resolve(self, call: _Call, repo_id: str, revision: str, path: str) -> _Reply:
        """A file's contents. ``X-Repo-Commit`` goes with the 404 too: the client caches "not there" by commit."""
        commit = self.find(call, repo_id).find(revision)
        headers = {"X-Repo-Commit": commit.sha}
        oid = commit.files.get(path)
        if oid is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        size = self.blobs.size(oid)
        headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if call.method == "HEAD":
            return _Reply(200, headers, size=size)
        span = _parse_range(call.byte_range, size)
        if span is None:
            return _Reply(200, headers, self.blobs.read(oid))
        if span[0] >= span[1]:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{size}"
        return _Reply(206, headers, self.blobs.read(oid, span[0], span[1] - span[0]))

    def _apply(self, files: dict[str, str], key: str, value: dict[str, Any]) -> None:
        """Change a listing by one line of a commit."""
        path = value["path"]
        if key == "file" and value["encoding"] == "base64":
            files[path] = self.blobs.write(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in self.uploads:
            files[path] = self.uploads[value["oid"]]
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        elif key == "deletedFile":
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(501, f"the fake hub does not commit '{key}'")

    def _check_token(self, call: _Call, required: bool, code: str | None = None) -> None:
        """A wrong token is always refused, a missing one only where it is required; both as the Hub words it."""
        if call.token is None and required:
            raise HubError(401, "Invalid username or password.", code)
        if call.token not in (None, TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")


_MODEL = r"/(?P<repo_id>[^/]+(?:/[^/]+)?)"
_REVISION = r"/(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., _Reply]]] = [
    ("GET", re.compile("/api/whoami-v2"), _Api.whoami),
    ("POST", re.compile("/api/validate-yaml"), _Api.validate_yaml),
    ("POST", re.compile("/api/repos/create"), _Api.create_repo),
    ("POST", re.compile(f"/api/models{_MODEL}/branch{_REVISION}"), _Api.create_branch),
    ("POST", re.compile(f"/api/models{_MODEL}/preupload{_REVISION}"), _Api.preupload),
    ("POST", re.compile(f"/api/models{_MODEL}/commit{_REVISION}"), _Api.commit),
    ("POST", re.compile(rf"{_MODEL}\.git/info/lfs/objects/batch"), _Api.lfs_batch),
    ("PUT", re.compile("/uploads/(?P<oid>[0-9a-f]{64})"), _Api.upload),
    ("GET", re.compile(f"/api/models{_MODEL}/revision{_REVISION}"), _Api.info),
    ("GET", re.compile(f"/api/models{_MODEL}/tree{_REVISION}(?:/(?P<path>.+))?"), _Api.tree),
    ("GET", re.compile(f"/api/models{_MODEL}"), _Api.info),
    ("GET", re.compile(f"{_MODEL}/resolve{_REVISION}/(?P<path>.+)"), _Api.resolve),
]


class _Server(ThreadingHTTPServer):
    """The listening socket, with the hub that its handlers answer from."""

    hub: FakeHub


class _Handler(BaseHTTPRequestHandler):
    """HTTP in, HTTP out; what to answer is the hub's affair."""

    server: _Server
    protocol_version = "HTTP/1.1"  # keep connections open, as the real Hub does
    disable_nagle_algorithm = True  # headers and body are two writes; without this each reply waits 40 ms

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        call = _Call(self.command, parse_qs(url.query), token, self.headers.get("Range"), body)
        reply = self.server.hub._answer(url.path, call)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may be killed meanwhile
            self._send(reply)

    do_HEAD = do_GET
    do_POST = do_GET
    do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output quiet; the hub has its own log."""

    def _send(self, reply: _Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body) if reply.size is None else reply.size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)


class FakeHub:
    """The server, as a context manager: it listens from entry to exit, and its files are gone afterwards.

    A token (``hf_test``, which ``environment`` hands out) is needed to write and to read private repositories;
    with ``require_token``, for everything. ``requests`` logs every request that has been answered, oldest first.
    ``lfs`` makes the client upload weights one by one, as the real Hub does; :meth:`on_upload` watches.
    """

    def __init__(self, require_token: bool = False, lfs: bool = False) -> None:
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._require_token = require_token
        self._lfs = lfs

    def __enter__(self) -> FakeHub:
        self._folder = tempfile.TemporaryDirectory(prefix="fake_hub_")
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._api = _Api(self.endpoint, BlobStore(Path(self._folder.name)), self._require_token, self._lfs)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def environment(self, cache_dir: str | Path, token: str = TOKEN) -> dict[str, str]:
        """Variables that point a client process here, to be laid over ``os.environ``.

        They also undo settings of the surrounding machine that would lead the client elsewhere: another cache,
        offline mode, a proxy. An empty ``token`` makes the client anonymous.
        """
        cache = Path(cache_dir)
        places = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub")}
        access = {"HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": "", "HF_TOKEN_PATH": str(cache / "token")}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {**places, **access, **quiet, **online, "HF_HUB_DISABLE_XET": "1"}

    def add_folder(self, repo_id: str, folder: str | Path, *, private: bool = False, message: str = "seed") -> str:
        """Seed a repository without a client; returns the new sha.

        The commit on ``main`` holds exactly the folder's files. ``private`` counts where the repository is new.
        """
        root = Path(folder)
        with self._lock:
            repository = self._api.repositories.get(repo_id) or self._api.create(repo_id, private)
            paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
            files = {path.relative_to(root).as_posix(): self._api.blobs.write(path.read_bytes()) for path in paths}
            return repository.commit(files, message).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision, by its path in the repository."""
        with self._lock:
            commit = self._api.repositories[repo_id].find(revision)
            return {path: self._api.blobs.read(oid) for path, oid in commit.files.items()}

    def on_upload(self, action: Callable[[], None]) -> None:
        """What to do, from now on, whenever a large file has arrived, before the client is told."""
        self._api.on_upload = action

    def commits(self, repo_id: str) -> list[Commit]:
        """A repository's commits, oldest first. The first, empty one is made when the repository is created."""
        with self._lock:
            return list(self._api.repositories[repo_id].commits.values())

    def is_private(self, repo_id: str) -> bool:
        """Whether the repository was created as private."""
        with self._lock:
            return self._api.repositories[repo_id].private

    def _answer(self, path: str, call: _Call) -> _Reply:
        """Answer and log under one lock. The line is there before the client can see the response."""
        with self._lock:
            reply = self._api.answer(path, call)
            sent = 0 if call.method == "HEAD" else len(reply.body)
            self.requests.append(Request(call.method, unquote(path), call.byte_range, reply.status, sent))
            return reply
