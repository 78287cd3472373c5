"""A Hugging Face Hub on loopback: the unmodified client pushes to it and pulls from it over real HTTP.

Repositories live in memory. Every route is one function with its method and path above it; what it returns is sent as JSON.
`Hub.log` holds (method, path, status) of every request, `Hub.failures` makes the next requests that match fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".gguf", ".npz", ".parquet", ".zip")
LFS_BYTES = 10_000_000
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


class Refused(Exception):
    """An answer with an error status, in the form that the client turns into its own exceptions."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of the blob; of an LFS file git holds only the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def facts(self) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"oid": self.oid, "blobId": self.oid, "size": len(self.data), **lfs}


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    title: str
    author: str
    parent: "Commit | None"
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z")

    @property
    def sha(self) -> str:
        tree = sorted((path, file.oid) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent and self.parent.sha, self.title, self.author, self.date, tree)).encode()).hexdigest()

    def history(self) -> "list[Commit]":
        return [self, *(self.parent.history() if self.parent else [])]

    def file(self, path: str) -> File:
        if path not in self.files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": self.sha})
        return self.files[path]


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    refs: dict[str, Commit]

    def commit(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        for commit in (c for head in self.refs.values() for c in head.history()):
            if len(revision) >= 7 and commit.sha.startswith(revision):
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def card(self) -> dict[str, Any]:
        readme = self.refs["refs/heads/main"].files.get("README.md")
        header = re.match(r"---\n(.*?)\n---", readme.data.decode(), re.S) if readme else None
        return yaml.safe_load(header[1]) if header else {}

    def info(self, commit: Commit) -> dict[str, Any]:
        card, owner = self.card(), self.name.split("/")[0]
        return {
            "_id": hashlib.md5(self.name.encode()).hexdigest()[:24], "id": self.name, "modelId": self.name, "author": owner,
            "sha": commit.sha,
            "createdAt": commit.history()[-1].date, "lastModified": commit.date, "private": self.private, "gated": False, "disabled": False,
            "downloads": 0, "likes": 0, "tags": list(card.get("tags") or []), "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"), "cardData": card, "trustedKernelPublisher": True,
            "siblings": [{"rfilename": path, **file.facts()} for path, file in sorted(commit.files.items())],
        }  # fmt: skip


@dataclass
class Request:
    hub: "Hub"
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def owns(self, namespace: str) -> bool:
        return self.user is not None and (namespace == self.user or self.user in self.hub.organizations.get(namespace, ()))

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """The repository as this user may see it: a private one does not exist for strangers."""
        repo = self.hub.repos.get((kind, name))
        owner = self.owns(name.split("/")[0])
        if repo is None or (repo.private and not owner):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise Refused(403 if self.user else 401, f"You don't have the rights to write to {name}")
        return repo


@dataclass
class Raw:
    """A file as the answer, whole or the part that the Range header asks for."""

    data: bytes
    headers: dict[str, str]


@dataclass
class Hub:
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_alice": "alice", "hf_bob": "bob"})
    organizations: dict[str, set[str]] = field(default_factory=lambda: {"hf-tokens": {"alice"}})
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    failures: list[tuple[str, int]] = field(default_factory=list)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def user(self, authorization: str) -> str | None:
        token = authorization.removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Any:
        url = urlsplit(target)
        for i, (pattern, status) in enumerate(self.failures):
            if re.search(pattern, f"{method} {url.path}"):
                del self.failures[i]
                raise Refused(status, "injected failure")
        request = Request(self, method, url.path, parse_qs(url.query), headers, body, self.user(headers.get("Authorization", "")))
        for verbs, pattern, function in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and method in verbs.split():
                return function(request, **{name: unquote(part or "") for name, part in match.groupdict().items()})
        raise Refused(404, f"no such route: {method} {url.path}")


def route(verbs: str, path: str) -> Callable[[Callable], Callable]:
    """`{x}` is one segment, `{x*}` the rest; `{kinds}` is models, datasets, ...; `{prefix}` is nothing for a model."""
    pattern = path.replace("{kinds}", "(?P<kinds>models|datasets|spaces|kernels)")
    pattern = pattern.replace("{prefix}", "(?P<prefix>(datasets|spaces|kernels)/)?").replace("{name}", "(?P<name>[^/]+/[^/]+?)")
    pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.*)", re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def add(function: Callable) -> Callable:
        ROUTES.append((verbs, re.compile(pattern), function))
        return function

    return add


@route("GET", "/api/whoami-v2")
def whoami(request):
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name, members in request.hub.organizations.items() if request.user in members]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return {"type": "user", "id": request.user, "name": request.user, "fullname": request.user, "orgs": orgs, "auth": token}


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    return {"errors": [], "warnings": []}


@route("GET HEAD POST", "/api/telemetry/{rest*}")
def telemetry(request, rest):
    return {}


@route("GET", "/api/organizations/{owner}/overview")
def overview(request, owner):
    return {"name": owner, "fullname": owner, "avatarUrl": "", "trustedKernelPublisher": True}


@route("POST", "/api/repos/create")
def create_repo(request):
    body = request.json()
    kind, namespace = body.get("type") or "model", body.get("organization") or request.user
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    if not request.owns(namespace):
        raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {namespace}")
    name = f"{namespace}/{body['name']}"
    url = f"{request.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in request.hub.repos:
        raise Refused(409, "You already created this repo", url=url)
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    first = Commit({".gitattributes": File(attributes.encode(), lfs=False)}, "initial commit", request.user, parent=None)
    private = bool(body.get("private")) or body.get("visibility") == "private"
    request.hub.repos[kind, name] = Repo(kind, name, private, {"refs/heads/main": first})
    return {"url": url, "name": name, "id": name}


@route("DELETE", "/api/repos/delete")
def delete_repo(request):
    body = request.json()
    repo = request.repo(body.get("type") or "model", f"{body.get('organization') or request.user}/{body['name']}", write=True)
    del request.hub.repos[repo.kind, repo.name]
    return {}


@route("POST", "/api/repos/move")
def move_repo(request):
    body = request.json()
    repo = request.repo(body["type"], body["fromRepo"], write=True)
    del request.hub.repos[repo.kind, repo.name]
    repo.name = body["toRepo"]
    request.hub.repos[repo.kind, repo.name] = repo
    return {}


@route("GET", "/api/{kinds}")
def list_repos(request, kinds):
    seen = [r for r in request.hub.repos.values() if r.kind == kinds[:-1] and (not r.private or request.owns(r.name.split("/")[0]))]
    wanted, search = set(request.query.get("filter", [])), request.query.get("search", [""])[0].lower()
    author = request.query.get("author", [None])[0]
    facts = [repo.info(repo.commit("main")) for repo in seen]
    return [f for f in facts if wanted <= set(f["tags"]) and search in f["id"].lower() and author in (None, f["author"])]


@route("GET", "/api/{kinds}/{name}(/revision/{revision})?")
def repo_info(request, kinds, name, revision):
    repo = request.repo(kinds[:-1], name)
    return repo.info(repo.commit(revision or "main"))


@route("PUT", "/api/{kinds}/{name}/settings")
def settings(request, kinds, name):
    repo, body = request.repo(kinds[:-1], name, write=True), request.json()
    repo.private = body["visibility"] == "private" if "visibility" in body else body.get("private", repo.private)
    return {"private": repo.private}


@route("GET", "/api/{kinds}/{name}/auth-check")
def auth_check(request, kinds, name):
    request.repo(kinds[:-1], name)
    return {}


@route("GET", "/api/{kinds}/{name}/discussions")
def discussions(request, kinds, name):
    request.repo(kinds[:-1], name)
    return {"discussions": [], "count": 0, "start": 0}


@route("POST", "/api/{kinds}/{name}/preupload/{revision}")
def preupload(request, kinds, name, revision):
    commit = request.repo(kinds[:-1], name, write=True).commit(revision)

    def mode(entry):
        old, lfs = commit.files.get(entry["path"]), entry["path"].endswith(LFS_SUFFIXES) or entry["size"] > LFS_BYTES
        oid = None if old is None else old.sha256 if old.lfs else old.oid
        return {"path": entry["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    return {"files": [mode(entry) for entry in request.json()["files"]], "commitOid": commit.sha}


@route("POST", "/{prefix}{name}\\.git/info/lfs/objects/batch")
def lfs_batch(request, prefix, name):
    request.repo(prefix[:-2] or "model", name, write=True)

    def target(entry):
        href = f"{request.hub.url}/storage/{entry['oid']}"
        actions = {} if entry["oid"] in request.hub.storage else {"actions": {"upload": {"href": href}}}
        return {"oid": entry["oid"], "size": entry["size"], **actions}

    return {"transfer": "basic", "objects": [target(entry) for entry in request.json()["objects"]]}


@route("PUT", "/storage/{oid}")
def lfs_upload(request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "sha256 mismatch")
    request.hub.storage[oid] = request.body
    return {}


def apply_operation(files: dict[str, File], storage: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    path = value.get("path", "")
    if key == "file":
        data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
        files[path] = File(data, lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in storage:
            raise Refused(400, f"LFS object {value['oid']} was never uploaded")
        files[path] = File(storage[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
    elif key == "deletedFolder":
        for old in [p for p in files if p.startswith(path.rstrip("/") + "/")]:
            del files[old]


@route("POST", "/api/{kinds}/{name}/commit/{revision}")
def commit(request, kinds, name, revision):
    repo = request.repo(kinds[:-1], name, write=True)
    base = repo.commit(revision)
    operations = [json.loads(line) for line in request.body.decode().splitlines() if line.strip()]
    header = next(op["value"] for op in operations if op["key"] == "header")
    if not base.sha.startswith(header.get("parentCommit") or ""):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for op in operations:
        apply_operation(files, request.hub.storage, op["key"], op["value"])
    new = Commit(files, header["summary"], request.user, base)
    url = f"{request.hub.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{name}"
    answer = {"success": True, "commitOid": new.sha, "commitUrl": f"{url}/commit/{new.sha}"}
    if "create_pr" in request.query:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        repo.refs[f"refs/pr/{number}"] = new
        return {**answer, "pullRequestUrl": f"{url}/discussions/{number}"}
    ref = revision if revision in repo.refs else f"refs/heads/{revision}"
    if ref not in repo.refs:
        raise Refused(400, f"{revision} is not a branch")
    repo.refs[ref] = new
    return answer


@route("GET", "/api/{kinds}/{name}/tree/{revision}(/{folder*})?")
def tree(request, kinds, name, revision, folder):
    commit = request.repo(kinds[:-1], name).commit(revision)
    start = f"{folder.strip('/')}/" if folder.strip("/") else ""
    paths = [path for path in sorted(commit.files) if path.startswith(start)]
    if start and not paths:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    deep = request.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    parents = {start + "/".join(path[len(start) :].split("/")[:i]) for path in paths for i in range(1, path[len(start) :].count("/") + 1)}
    shown = lambda path: deep or "/" not in path[len(start) :]
    folders = [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0} for path in sorted(parents)]
    entries = [*folders, *({"type": "file", "path": path, **commit.files[path].facts()} for path in paths)]
    return [entry for entry in entries if shown(entry["path"])]


@route("POST", "/api/{kinds}/{name}/paths-info/{revision}")
def paths_info(request, kinds, name, revision):
    commit, body = request.repo(kinds[:-1], name).commit(revision), request.body.decode()
    paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
    return [{"type": "file", "path": path, **commit.files[path].facts()} for path in paths if path in commit.files]


@route("GET", "/api/{kinds}/{name}/refs")
def list_refs(request, kinds, name):
    refs = request.repo(kinds[:-1], name).refs
    under = lambda start: [{"name": r.removeprefix(start), "ref": r, "targetCommit": c.sha} for r, c in refs.items() if r.startswith(start)]
    return {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": [], "pullRequests": under("refs/pr/")}


@route("GET", "/api/{kinds}/{name}/commits/{revision}")
def list_commits(request, kinds, name, revision):
    history = request.repo(kinds[:-1], name).commit(revision).history()
    return [{"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.author}]} for c in history]


@route("POST DELETE", "/api/{kinds}/{name}/branch/{branch*}")
def change_branch(request, kinds, name, branch):
    repo, body = request.repo(kinds[:-1], name, write=True), request.json()
    return change_ref(request, repo, f"refs/heads/{branch}", body.get("startingPoint") or "main")


@route("POST DELETE", "/api/{kinds}/{name}/tag/{revision*}")
def change_tag(request, kinds, name, revision):
    repo = request.repo(kinds[:-1], name, write=True)
    return change_ref(request, repo, f"refs/tags/{request.json().get('tag', revision)}", revision)


def change_ref(request: Request, repo: Repo, ref: str, start: str) -> dict:
    if request.method == "DELETE":
        if repo.refs.pop(ref, None) is None:
            raise Refused(404, f"{ref} does not exist", "RevisionNotFound")
    elif ref in repo.refs:
        raise Refused(409, f"Reference {ref} already exists")
    else:
        repo.refs[ref] = repo.commit(start)
    return {}


@route("GET HEAD", "/{prefix}{name}/resolve/{revision}/{path*}")
def resolve(request, prefix, name, revision, path):
    commit = request.repo(prefix[:-2] or "model", name).commit(revision)
    file = commit.file(path)
    linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))} if file.lfs else {}
    return Raw(file.data, {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes", **linked})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        """The hub's own log is enough; stderr belongs to the tests."""

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self):
        body = self.read_body()
        try:
            with self.hub.lock:
                status, answer = 200, self.hub.answer(self.command, self.path, self.headers, body)
        except Refused as refusal:
            status, answer = refusal.status, Raw(json.dumps(refusal.body).encode(), refusal.headers)
        if not isinstance(answer, Raw):
            answer = Raw(json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(answer.data)), len(answer.data) - 1)
            headers = {**answer.headers, "Content-Range": f"bytes {first}-{last}/{len(answer.data)}"}
            status, answer = 206, Raw(answer.data[first : last + 1], headers)
        self.hub.log.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = reply


@contextmanager
def serve():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
