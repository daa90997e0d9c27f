"""A Hugging Face Hub on this machine: what ``huggingface_hub`` asks of one to make, write and read model repositories.

Branches are lists of commits, a commit is a mapping from path to content, and large files go by their SHA-256 first, as
on the real one. There are two users, known by their tokens: one may write to repositories of their own, one may not
write at all.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, READER = "hf_owner", "hf_reader"
_USERS = {OWNER: "mechanic", READER: "reader"}


@dataclass
class Commit:
    subject: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        content = repr((self.subject, sorted((path, git_id(data)) for path, data in self.files.items())))
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: dict | None = None):
        self.status, self.code, self.message, self.body = status, code, message, body or {}


class HubServer:
    """Listens on a free port of the loopback interface until the process ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def repository(self, name: str, user: str | None, write: bool = False) -> Repository:
        found = self.repositories.get(name)
        owner = name.removeprefix("datasets/").split("/")[0]
        if found is None or (found.private and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refusal(403 if user else 401, message="no write permission")
        return found

    def put_large_file(self, oid: str, content: bytes) -> None:
        assert large_id(content) == oid
        self.large_files[oid] = content


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in _USERS:
                raise Refusal(401, message="Invalid credentials in Authorization header")
            self.user = _USERS.get(token)
            for pattern, route in _ROUTES:
                if match := re.fullmatch(pattern, f"{method} {url.path}"):
                    return route(self, *(unquote(group) for group in match.groups() if group is not None))
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.body, refusal.status, **{key: value for key, value in headers.items() if value})

    def _send(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        if self.user != _USERS[OWNER] or not name.startswith(f"{self.user}/"):
            raise Refusal(403, message="no rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise Refusal(409, body={"url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self._send({"url": f"{self.hub.url}/{name}"})

    def validate_card(self) -> None:
        front_matter = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.S)
        try:
            yaml.safe_load(front_matter[1] if front_matter else "")
        except yaml.YAMLError as error:
            raise Refusal(400, body={"errors": [{"message": str(error)}]}) from error
        self._send({"errors": [], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        branches = self.hub.repository(name, self.user, write=True).branches
        if branch in branches:
            raise Refusal(409)
        branches[branch] = list(branches["main"])
        self._send({})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.hub.repository(name, self.user, write="create_pr" not in self.query)
        have = self._commit(repository, revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            content = have.get(file["path"])
            known = {} if content is None else {"oid": large_id(content) if mode == "lfs" else git_id(content)}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self._send({"files": files})

    def large_files(self, name: str) -> None:
        self.hub.repository(name, self.user)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/large-files/{item['oid']}"}}
        self._send({"transfer": "basic", "objects": objects})

    def put_large_file(self, oid: str) -> None:
        self.hub.put_large_file(oid, self.body)
        self._send({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.hub.repository(name, self.user, write="create_pr" not in self.query)
        files = dict(self._commit(repository, revision).files)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif operation["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(400, message=f"cannot delete {value['path']}, which does not exist")
                del files[value["path"]]
        branch = "refs/pr/1" if "create_pr" in self.query else revision
        commits = repository.branches.setdefault(branch, list(repository.branches[revision]))
        commits.append(Commit(header["value"]["summary"], files))
        url = f"{self.hub.url}/{name}"
        answer = {"commitUrl": f"{url}/commit/{commits[-1].sha}", "commitOid": commits[-1].sha}
        self._send({**answer, "success": True, "pullRequestUrl": f"{url}/discussions/1"})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.hub.repository(name, self.user)
        commit = self._commit(repository, revision)
        files = [{"rfilename": path} for path in commit.files]
        self._send({"id": name, "sha": commit.sha, "private": repository.private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        files = self._commit(self.hub.repository(name, self.user), revision).files
        inside = {path: content for path, content in files.items() if path.startswith(folder)}
        if folder and not inside:  # the root of an empty repository is there
            raise Refusal(404, "EntryNotFound", "Entry not found")
        entries = [_entry(path, content) for path, content in inside.items()]
        if self.query.get("recursive", ["false"])[0].lower() == "false":
            parts = {path: path[len(folder) :].lstrip("/").split("/") for path in inside}
            folders = {f"{folder}/{first}".lstrip("/") for first, *rest in parts.values() if rest}
            entries = [entry for entry in entries if len(parts[entry["path"]]) == 1]
            entries += [{"type": "directory", "path": path, "oid": git_id(path.encode())} for path in folders]
        self._send(entries)

    def paths_info(self, name: str, revision: str) -> None:
        files = self._commit(self.hub.repository(name, self.user), revision).files
        wanted = json.loads(self.body)["paths"]
        self._send([_entry(path, content) for path, content in files.items() if path in wanted])

    def file(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(self.hub.repository(name, self.user), revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{git_id(content)}"'}
        self._send(content, **headers)

    def _commit(self, repository: Repository, revision: str) -> Commit:
        if (commit := repository.find(revision)) is None:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}


def large_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


#: A dataset keeps ``datasets`` in its name, as in the addresses of its files.
_REPOSITORY = "/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"
_ROUTES = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_card),
    (f"POST {_REPOSITORY}/branch/([^/]+)", _Handler.branch),
    (f"POST {_REPOSITORY}/preupload/([^/]+)", _Handler.preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT /large-files/([0-9a-f]+)", _Handler.put_large_file),
    (f"POST {_REPOSITORY}/commit/([^/]+)", _Handler.commit),
    (f"GET {_REPOSITORY}", _Handler.info),
    ("GET /api/models/([^/]+)(?:/revision/[^/]+)?", _Handler.info),  # a name without an owner
    (f"GET {_REPOSITORY}/revision/([^/]+)", _Handler.info),
    (f"GET {_REPOSITORY}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (f"POST {_REPOSITORY}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET /((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.file),
]
