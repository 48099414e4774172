"""A Hugging Face Hub on loopback: the endpoints that huggingface_hub calls for model repositories, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api

WRITER, STRANGER, NARROW = "hf_writer", "hf_stranger", "hf_narrow"
REPOSITORY = "me/my-bank"
Files = dict[str, bytes]
Answer = tuple[bytes, dict[str, str]]


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, code: str = "", message: str = "", body: object = None) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.data = json.dumps(body or {}).encode()


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches a pattern.

    "die" breaks off in the middle of the answer; "lose" does what was asked and then breaks off; "truncate" sends half
    and says that it is all; "corrupt" flips a bit; "slow" waits before the body.
    """

    pattern: str
    kind: str
    times: float = float("inf")
    seconds: float = 0.0

    def strikes(self, request: str) -> bool:
        if self.times < 1 or not re.search(self.pattern, request):
            return False
        self.times -= 1
        return True


@dataclass
class Asked:
    token: str | None
    query: str
    body: bytes


@dataclass
class Repository:
    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return sha


class Hub:
    """The server's state, and what it was asked."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        # What each token may do: as whom, and whether to write.
        self.tokens = {WRITER: ("me", True), STRANGER: ("other", True), NARROW: ("me", False)}
        self.repositories: dict[str, Repository] = {}
        self.objects: Files = {}
        self.faults: list[Fault] = []
        self.fetched: list[str] = []
        self.uploaded: list[str] = []
        self.commits: list[list[str]] = []
        self.refused = 0
        # {"METHOD /path" pattern: what happens once, before that is answered}
        self.before: dict[str, Callable[[], object]] = {}
        self.lock = threading.RLock()

    def files(self, repository: str, revision: str = "main") -> Files:
        """What a repository holds."""
        found = self.repositories[repository]
        return found.commits[found.branches[revision]]

    def publish(self, repository: str, files: Files) -> None:
        """Put a repository there, as if somebody had pushed it."""
        found = self.repositories.setdefault(repository, Repository(repository.split("/")[0]))
        found.commit("main", dict(files))

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make it the Hub that huggingface_hub talks to by itself, logged in as the writer."""
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)  # which PEFT asks whether a file is there
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + "".join(template[1:]))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", WRITER)

    def meet_before_commit(self, clients: int) -> None:
        """Let the next commits of so many clients come in at one moment: each has seen the same head."""
        barrier = threading.Barrier(clients)
        self.before.update({rf"POST .*/commit/.*{'(?#)' * n}": barrier.wait for n in range(clients)})

    def forget(self) -> None:
        """Count from here."""
        self.fetched.clear()
        self.uploaded.clear()
        self.commits.clear()

    def happen(self, request: str) -> None:
        with self.lock:
            found = next((pattern for pattern in self.before if re.search(pattern, request)), None)
            action = self.before.pop(found, None)
        if action is not None:
            action()

    def answer(self, request: str, asked: Asked) -> Answer:
        for pattern, action in _ROUTES.items():
            if match := re.fullmatch(pattern, request):
                with self.lock:
                    return action(self, asked, *map(unquote, match.groups()))
        raise Refused(404)

    def readable(self, name: str, token: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or repository.private:
            if token is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            if repository is None or self.tokens[token][0] != repository.owner:
                raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, name: str, token: str | None) -> Repository:
        repository = self.readable(name, token)
        self.check_write(repository.owner, token)
        return repository

    def check_write(self, owner: str, token: str | None) -> None:
        if token is None:
            raise Refused(401, "", "Invalid username or password.")
        if self.tokens[token] != (owner, True):
            raise Refused(403, "", "you do not have the required permissions")


def _json(value: object) -> Answer:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def _create(hub: Hub, asked: Asked) -> Answer:
    wanted = json.loads(asked.body)
    if asked.token is None:
        raise Refused(401, "", "Invalid username or password.")
    owner = wanted["organization"] or hub.tokens[asked.token][0]
    hub.check_write(owner, asked.token)
    name = f"{owner}/{wanted['name']}"
    if name in hub.repositories:
        raise Refused(409, body={"url": f"{hub.endpoint}/{name}"})
    hub.repositories[name] = Repository(owner, wanted.get("visibility") == "private")
    hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
    return _json({"url": f"{hub.endpoint}/{name}"})


def _whoami(hub: Hub, asked: Asked) -> Answer:
    if asked.token is None:
        raise Refused(401, "", "Invalid username or password.")
    return _json({"name": hub.tokens[asked.token][0]})


def _validate(hub: Hub, asked: Asked) -> Answer:
    """As strict as the Hub in what matters here: YAML, and a base model that is a repository id."""
    metadata = yaml.safe_load(json.loads(asked.body)["content"].split("---")[1])
    base = metadata.get("base_model", "a/b")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise Refused(400, body={"errors": [{"message": f"base_model {base!r} is no model id"}]})
    return _json({})


def _info(hub: Hub, asked: Asked, name: str, revision: str = "main") -> Answer:
    repository = hub.readable(name, asked.token)
    sha = repository.sha(revision)
    siblings = [{"rfilename": path} for path in repository.commits[sha]]
    return _json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})


def _tree(hub: Hub, asked: Asked, name: str, revision: str) -> Answer:
    repository = hub.readable(name, asked.token)
    files = repository.commits[repository.sha(revision)]
    return _json([{"type": "file", "path": path, "size": len(data), "oid": path} for path, data in files.items()])


def _resolve(hub: Hub, asked: Asked, name: str, revision: str, path: str) -> Answer:
    repository = hub.readable(name, asked.token)
    if repository.gated and hub.tokens.get(asked.token, ("",))[0] != repository.owner:
        raise Refused(403 if asked.token else 401, "GatedRepo", "Access to this model is restricted")
    sha = repository.sha(revision)
    if path not in repository.commits[sha]:
        raise Refused(404, "EntryNotFound")
    data = repository.commits[sha][path]
    return data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}


def _get(hub: Hub, asked: Asked, name: str, revision: str, path: str) -> Answer:
    answer = _resolve(hub, asked, name, revision, path)
    hub.fetched.append(path)
    return answer


def _branch(hub: Hub, asked: Asked, name: str, branch: str) -> Answer:
    repository = hub.writable(name, asked.token)
    if branch in repository.branches:
        raise Refused(409)
    repository.branches[branch] = repository.branches["main"]
    return _json({})


def _preupload(hub: Hub, asked: Asked, name: str, revision: str) -> Answer:
    allowed = hub.readable if "create_pr" in asked.query else hub.writable
    repository = allowed(name, asked.token)
    present = repository.commits[repository.sha(revision)]

    def told(path: str) -> dict[str, object]:
        large = path.endswith((".safetensors", ".png"))
        known = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path not in present:
            return known
        data = present[path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {**known, "oid": hashlib.sha256(data).hexdigest() if large else git}

    return _json({"files": [told(file["path"]) for file in json.loads(asked.body)["files"]]})


def _batch(hub: Hub, asked: Asked, name: str) -> Answer:
    def told(item: dict) -> dict[str, object]:
        if item["oid"] in hub.objects:
            return item
        where = {"upload": f"{hub.endpoint}/lfs/{item['oid']}", "verify": f"{hub.endpoint}/verify"}
        return {**item, "actions": {action: {"href": url} for action, url in where.items()}}

    return _json({"transfer": "basic", "objects": [told(item) for item in json.loads(asked.body)["objects"]]})


def _upload(hub: Hub, asked: Asked, oid: str) -> Answer:
    if hashlib.sha256(asked.body).hexdigest() != oid:
        raise Refused(400)
    hub.objects[oid] = asked.body
    hub.uploaded.append(oid)
    return b"", {}


def _verify(hub: Hub, asked: Asked) -> Answer:
    item = json.loads(asked.body)
    if len(hub.objects.get(item["oid"], b"")) != item["size"]:
        raise Refused(422)
    return _json({})


def _commit(hub: Hub, asked: Asked, name: str, branch: str) -> Answer:
    request = "create_pr" in asked.query
    repository = (hub.readable if request else hub.writable)(name, asked.token)
    header, *lines = [json.loads(line) for line in asked.body.splitlines()]
    head = repository.sha(branch)
    parent = header["value"].get("parentCommit", head)
    if parent != head and not request:
        hub.refused += 1
        raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[parent])
    for line in lines:
        _apply(hub, files, line["key"], line["value"])
    hub.commits.append(sorted(line["value"]["path"] for line in lines))
    number = sum(ref.startswith("refs/pr/") for ref in repository.branches) + 1
    sha = repository.commit(f"refs/pr/{number}" if request else branch, files)
    told = {"commitUrl": f"{hub.endpoint}/{name}/commit/{sha}", "commitOid": sha}
    return _json({**told, "pullRequestUrl": f"{hub.endpoint}/{name}/discussions/{number}"} if request else told)


def _apply(hub: Hub, files: Files, key: str, value: dict) -> None:
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = hub.objects[value["oid"]]
    elif value["path"] not in files:
        raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
    else:
        del files[value["path"]]


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    r"POST /api/repos/create": _create,
    r"GET /api/whoami-v2": _whoami,
    r"POST /api/validate-yaml": _validate,
    rf"POST /api/models/{_NAME}/branch/([^/]+)": _branch,
    rf"POST /api/models/{_NAME}/preupload/([^/]+)": _preupload,
    rf"POST /api/models/{_NAME}/commit/([^/]+)": _commit,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/(\w+)": _upload,
    r"POST /verify": _verify,
    rf"GET /api/models/{_NAME}": _info,
    rf"GET /api/models/{_NAME}/revision/([^/]+)": _info,
    rf"GET /api/models/{_NAME}/tree/([^/]+)": _tree,
    rf"HEAD /{_NAME}/resolve/([^/]+)/(.+)": _resolve,
    rf"GET /{_NAME}/resolve/([^/]+)/(.+)": _get,
}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {url.path}"
        self.hub.happen(request)
        kinds = {fault.kind: fault for fault in self.hub.faults if fault.strikes(request)}
        if "die" in kinds and self.command != "GET":
            return  # before anything is done
        try:
            if token is not None and token not in self.hub.tokens:
                raise Refused(401, "", "Invalid credentials in Authorization header")
            data, headers = self.hub.answer(request, Asked(token, url.query, body))
        except Refused as refused:
            self.reply(refused.status, refused.data, refused.headers)
            return
        if "lose" in kinds:
            return
        if "slow" in kinds:
            time.sleep(kinds["slow"].seconds)
        if "corrupt" in kinds:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if "truncate" in kinds:
            data = data[: len(data) // 2]
        self.reply(200, data, headers, half="die" in kinds)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def reply(self, status: int, data: bytes, headers: dict[str, str], half: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if half else data)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that give up on a slow answer are part of the tests."""


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub without repositories, until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as a public `repository`; gives the endpoint and the list of files that are fetched."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    with running() as hub:
        hub.publish(repository, files)
        yield hub.endpoint, hub.fetched
