"""A hub on the loopback: as much of the Hub's protocol as huggingface_hub's client speaks, with faults on request.

    with Hub() as hub:
        hub.put("timm/ghostnet_100.in1k", {"model.safetensors": data, "config.json": b"{}"})
        hub.fail("cut", "GET", "model.safetensors")
        ...  # a client that was started with hub.environment(cache), or connect(hub, monkeypatch, cache)

Large files go the LFS way, as they do there: the answer to HEAD is a redirect to another origin, which needs no token.
"""

import base64
import hashlib
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml

LFS = (".safetensors", ".bin", ".png")
TOKEN = "hf_" + "LoopbackOnly" * 3


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits are {path: bytes}; a branch is a list of commit hashes, newest last."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=lambda: {"main": []})

    def commit(self, branch, changes):
        history = self.branches[branch]
        files = {**(self.commits[history[-1]] if history else {}), **changes}
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        history.append(oid)
        return oid

    def head(self, revision):
        """The commit of a branch or of its own hash; "" for a branch without commits, None for no such revision."""
        if revision in self.branches:
            return (self.branches[revision] or [""])[-1]
        return revision if revision in self.commits else None


@dataclass
class Fault:
    kind: str
    method: str
    part: str
    times: int


class Hub:
    """The server and what it holds. `requests` is the log: (method, path, headers) of every request, in order."""

    def __init__(self, token=TOKEN):
        self.token = token
        self.repositories, self.objects = {}, {}
        self.requests, self.faults = [], []
        self.lock = threading.Lock()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_port
        self.address, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id, files, revision="main", **access):
        """Commit files, {path: bytes} or a folder, to a repository; returns the commit's hash."""
        if not isinstance(files, dict):
            files = {path.name: path.read_bytes() for path in Path(files).iterdir() if path.is_file()}
        repository = self.repositories.setdefault(repo_id, Repository())
        for name, value in access.items():
            setattr(repository, name, value)
        repository.branches.setdefault(revision, [])
        return repository.commit(revision, files)

    def files(self, repo_id, revision="main"):
        repository = self.repositories[repo_id]
        return repository.commits.get(repository.head(revision), {})

    def fail(self, kind, method, part, times=1):
        """Let the next `times` requests of `method` whose path contains `part` go wrong.

        Kinds: a status such as "500"; "cut": half of the answer, then the end; "slow": a pause of two seconds in the
        middle; "short": half of the answer, said to be all; "flipped": one wrong byte; "lost": done, but not answered;
        a function: called first, then all goes well.
        """
        self.faults.append(Fault(kind, method, part, times))

    def fault(self, method, path):
        with self.lock:
            found = next((f for f in self.faults if f.times and f.method == method and f.part in path), None)
            if found:
                found.times -= 1
            return found and found.kind

    def asked(self, method, part=""):
        return [path for m, path, _ in self.requests if m == method and part in path]

    def environment(self, cache):
        """What a fresh process needs to have this hub for the Hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def connect(hub, monkeypatch, cache, token=None):
    """This process takes `hub` for the Hub until the test ends: what huggingface_hub would have read at its import."""
    constants = huggingface_hub.constants
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        "HF_TOKEN_PATH": str(Path(cache) / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)  # older clients know fewer
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


class _Stop(Exception):
    """An answer has been given already."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError):  # a client that went away
            super().handle()

    def _serve(self):
        self.url = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(self.path), self.headers))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.hub.fault(self.command, unquote(self.path))
        with suppress(_Stop):
            if callable(self.fault):
                self.fault = self.fault()
            if self.fault and self.fault.isdigit():
                self._refuse(int(self.fault), message="a fault on request")
            if self.fault == "cut" and self.command in ("POST", "PUT"):
                self._hang_up()
            self._route([unquote(part) for part in self.url.path.split("/")[1:]])

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, parts):
        if parts[0] == "storage":
            self._stored(parts[1])
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), *(parts[4:] or ["info"]))
        elif parts == ["api", "repos", "create"]:
            self._create()
        elif parts == ["api", "validate-yaml"]:
            self._validate_yaml()
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[1].endswith(".git"):
            self._lfs_batch("/".join(parts[:2]).removesuffix(".git"))
        else:
            self._refuse(404)

    # Answers --------------------------------------------------------------------------------------------------------

    def _answer(self, status, data=b"", headers=None):
        if self.fault == "lost":
            self._hang_up()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200):
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code=None, message=None, **headers):
        named = {"X-Error-Code": code, "X-Error-Message": message, **headers}
        self._answer(status, headers={name: value for name, value in named.items() if value})
        raise _Stop

    def _hang_up(self):
        self.close_connection = True
        raise _Stop

    def _given(self):
        return json.loads(self.body)

    # Who may --------------------------------------------------------------------------------------------------------

    def _signed_in(self):
        given = self.headers.get("Authorization")
        if given and given != f"Bearer {self.hub.token}":
            self._refuse(401, message="Invalid credentials in Authorization header")
        return bool(given)

    def _repository(self, repo_id, write=False):
        signed_in = self._signed_in()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not signed_in):
            self._refuse(404 if signed_in else 401, "RepoNotFound", "Repository not found")
        if write and not signed_in:
            self._refuse(401, message="Invalid username or password.")
        return repository

    def _commit_of(self, repository, revision):
        head = repository.head(revision)
        if head is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return head, repository.commits.get(head, {})

    # Downloads ------------------------------------------------------------------------------------------------------

    def _resolve(self, repo_id, revision, path):
        repository = self._repository(repo_id)
        if repository.gated:
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
        head, files = self._commit_of(repository, revision)
        if path not in files:
            self._refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": head})
        data = files[path]
        if not path.endswith(LFS):
            self._file(data, {"X-Repo-Commit": head, "ETag": f'"{git_oid(data)}"'})
            return
        oid = sha256(data)
        self.hub.objects[oid] = data
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": len(data)}
        location = f"{self.hub.storage}/storage/{oid}/{path}"
        self._answer(302, headers={"Location": location, "X-Repo-Commit": head, **linked})

    def _stored(self, oid):
        if self.command == "PUT":
            self._store(oid)
        elif oid in self.hub.objects:
            self._file(self.hub.objects[oid], {"ETag": f'"{oid}"'})
        else:
            self._refuse(404)

    def _file(self, data, headers):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = data[start:]
        if self.fault == "short":
            rest = rest[: len(rest) // 2]
        if self.fault == "flipped":
            rest = rest[:-1] + bytes([rest[-1] ^ 1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {"Content-Length": len(rest), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self._body(rest)

    def _body(self, data):
        middle = len(data) // 2
        self.wfile.write(data[:middle])
        if self.fault == "cut":
            self._hang_up()
        if self.fault == "slow":
            self.wfile.flush()
            time.sleep(2)
        self.wfile.write(data[middle:])

    # The API --------------------------------------------------------------------------------------------------------

    def _api(self, repo_id, verb, *rest):
        if verb == "branch":
            self._branch(self._repository(repo_id, write=True), rest[0])
            return
        repository = self._repository(repo_id, write=verb in ("preupload", "commit"))
        head, files = self._commit_of(repository, rest[0] if rest else "main")
        if verb in ("info", "revision"):
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": repo_id, "modelId": repo_id, "private": repository.private, "tags": [], "downloads": 0}
            self._json({**facts, "sha": head or None, "siblings": siblings})
        elif verb == "tree":
            self._json([_entry(path, data) for path, data in files.items()])
        elif verb == "paths-info":
            asked = parse_qs(self.body.decode())["paths"]
            self._json([_entry(path, files[path]) for path in asked if path in files])
        elif verb == "preupload":
            self._json({"files": [self._upload_mode(given["path"], files) for given in self._given()["files"]]})
        elif verb == "commit":
            self._commit(repo_id, repository, rest[0], head)
        else:
            self._refuse(404)

    def _create(self):
        if not self._signed_in():
            self._refuse(401, message="Invalid username or password.")
        given = self._given()
        repo_id = f"{given['organization']}/{given['name']}"
        url = {"url": f"{self.hub.address}/{repo_id}", "id": repo_id}
        if repo_id in self.hub.repositories:
            self._json(url, status=409)
            return
        private = given.get("visibility") == "private" or bool(given.get("private"))
        self.hub.repositories[repo_id] = Repository(private=private)
        self._json(url)

    def _branch(self, repository, branch):
        if branch in repository.branches:
            self._refuse(409)
        repository.branches[branch] = list(repository.branches["main"])
        self._json({})

    def _validate_yaml(self):
        """The Hub's rules that a card of ours could break."""
        header = yaml.safe_load(self._given()["content"].split("---\n")[1])
        errors = [] if isinstance(header, dict) else ["no metadata"]
        lists = [name for name in ("tags", "datasets") if not isinstance(header.get(name, []), list)]
        errors += [f"{name} must be a list" for name in lists]
        for entry in header.get("model-index", []):
            for result in entry["results"]:
                wanted = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                wanted += [value for metric in result["metrics"] for value in (metric["type"], metric["value"])]
                errors += [] if all(value not in (None, "") for value in wanted) else ["model-index is incomplete"]
        told = [{"message": message} for message in errors]
        self._json({"errors": told, "warnings": []}, status=400 if errors else 200)

    # Uploads --------------------------------------------------------------------------------------------------------

    def _upload_mode(self, path, files):
        data = files.get(path)
        lfs = path.endswith(LFS)
        oid = None if data is None else (sha256 if lfs else git_oid)(data)
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _lfs_batch(self, repo_id):
        self._repository(repo_id, write=True)
        objects = [{"oid": given["oid"], "size": given["size"]} for given in self._given()["objects"]]
        for given in objects:
            if given["oid"] not in self.hub.objects:
                given["actions"] = {"upload": {"href": f"{self.hub.storage}/storage/{given['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid):
        if sha256(self.body) != oid:
            self._refuse(400, message="the content is not what its name says")
        self.hub.objects[oid] = self.body
        self._answer(200)

    def _commit(self, repo_id, repository, branch, head):
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != head:
            self._refuse(412, message="A commit has happened since")
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                changes[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self._refuse(400, message=f"cannot commit {value['path']}")
        oid = repository.commit(branch, changes)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.address}/{repo_id}/commit/{oid}"})


def _entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    return entry
