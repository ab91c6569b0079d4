"""A stand-in for the hub's HTTP API on this machine: accounts, repositories, branches, commits, large files, downloads.

It answers what huggingface_hub asks without hf_xet (HF_HUB_DISABLE_XET), and sends hf_xet to a store of its own, whose
files it does not know unless a test puts them into `Hub.large`. It refuses what the hub refuses: wrong tokens, other
people's namespaces, names that are taken, commits on an older parent, large files that are not there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

# token -> (user, organisations, whether it may write)
TOKENS = {
    "hf_of_me": ("me", ["lab", "lab.eu"], True),
    "hf_reads_only": ("me", ["lab", "lab.eu"], False),
    "hf_of_other": ("other", [], True),
}


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        data = self.data if not self.lfs else f"version lfs\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repo:
    """branches: name -> [(commit, {path: Blob}, summary)], the newest last."""

    owner: str
    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, Blob], str]]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], summary: str) -> str:
        history = self.branches.setdefault(branch, [])
        text = f"{self.owner} {branch} {len(history)} {summary} {sorted(files)}"
        history.append((hashlib.sha1(text.encode()).hexdigest(), dict(files), summary))
        return history[-1][0]

    def find(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision in self.branches:
            return self.branches[revision][-1][:2]
        commits = [entry for history in self.branches.values() for entry in history]
        return next((entry[:2] for entry in commits if entry[0] == revision), None)


@dataclass
class Hub:
    """What the stand-in has, what it was asked, and how it fails.

    Attributes:
        lfs_above: a file of more bytes goes as a large file; None: none does.
        answers: (method, how the path begins) -> the status that is its answer.
        cut_upload: each upload of a large file is cut after so many bytes.
        cut_commit: "before" or "after" it is made, the connection of a commit is cut.
        down: after that many requests no connection is answered any more.
        store: what hf_xet is told to upload to.
    """

    url: str = ""
    lfs_above: int | None = 10_000
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    cut_upload: int | None = None
    cut_commit: str | None = None
    down: int | None = None
    store: str = ""

    def asked(self, method: str, part: str) -> int:
        """How often, with a path that has this part."""
        return sum(one == method and part in path for one, path in self.requests)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return {name: blob.data for name, blob in self.repos[repo].branches[branch][-1][1].items()}

    def add(self, repo: str, **files: bytes) -> None:
        """A repository that is there already; `config_json=b"..."` is its config.json."""
        made = self.repos[repo] = Repo(repo.partition("/")[0])
        made.commit("main", {".gitattributes": Blob(b"", False)}, "initial commit")
        if files:
            blobs = {name.replace("_json", ".json"): Blob(data, False) for name, data in files.items()}
            made.commit("main", {".gitattributes": Blob(b"", False), **blobs}, "earlier")


class _Cut(Exception):
    """The connection ends here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_any(self) -> None:
        hub, path = self.hub, urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path))
        self.query = urllib.parse.parse_qs(self.path.partition("?")[2])
        try:
            if hub.down is not None and len(hub.requests) > hub.down:
                raise _Cut
            for (method, begin), status in hub.answers.items():
                if method == self.command and path.startswith(begin):
                    self.body()
                    return self.refuse(status, "so it is planned")
            for pattern, method, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return answer(self, *match.groups())
            self.body()
            self.refuse(404, "no such route")
        except _Cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # ---- reading and answering

    def body(self, stop: int | None = None) -> bytes:
        """The request's body; or its first `stop` bytes, and then the connection is cut."""
        length = int(self.headers.get("Content-Length") or 0)
        if stop is not None and stop < length:
            self.rfile.read(stop)
            raise _Cut
        return self.rfile.read(length)

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, document: dict, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, text: str, code: str | None = None) -> None:
        self.json({"error": text}, status, X_Error_Message=text, **({"X_Error_Code": code} if code else {}))

    def account(self) -> tuple[str, list[str], bool] | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return TOKENS.get(token) if scheme == "Bearer" else None

    def may_write(self, owner: str) -> bool:
        user, orgs, writes = self.account() or ("", [], False)
        return writes and owner in (user, *orgs)

    def repo_of(self, name: str) -> Repo | None:
        """None, and the refusal is sent, where there is none that this account may see."""
        repo = self.hub.repos.get(name)
        user, orgs, _ = self.account() or ("", [], False)
        if repo is None or (repo.private and repo.owner not in (user, *orgs)):
            self.body()
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        return repo

    # ---- accounts and repositories

    def whoami(self) -> None:
        if (account := self.account()) is None:
            return self.refuse(401, "Invalid credentials in Authorization header")
        self.json({"type": "user", "name": account[0], "orgs": [{"type": "org", "name": one} for one in account[1]]})

    def create(self) -> None:
        wanted = json.loads(self.body())
        owner = wanted["organization"]
        name = f"{owner}/{wanted['name']}"
        if not self.may_write(owner):
            return self.refuse(403, f"no right to create a model under {owner}")
        if name in self.hub.repos:
            return self.json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        repo = self.hub.repos[name] = Repo(owner, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.json({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def delete(self) -> None:
        wanted = json.loads(self.body())
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(wanted["organization"]):
            return self.refuse(403, "no right to delete it")
        if self.hub.repos.pop(name, None) is None:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        self.json({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body())["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            found = yaml.safe_load(header[1]) if header else {}
            errors = [] if isinstance(found.get("license"), str) else [{"message": '"license" must be a string'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        found = repo.find(revision or "main")
        if found is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        for sibling, blob in zip(siblings, found[1].values(), strict=True):
            if "blobs" in self.query:
                sibling |= {"blobId": blob.git_oid, "size": len(blob.data)}
                if blob.lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
        document = {"id": name, "author": repo.owner, "sha": found[0], "private": repo.private, "tags": []}
        self.json({**document, "siblings": siblings})

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        self.body()
        if not self.may_write(repo.owner):
            return self.refuse(403, "no right to change branches")
        if self.command == "DELETE":
            del repo.branches[branch]
        elif branch in repo.branches:
            return self.refuse(409, f"Reference already exists: {branch}")
        else:
            repo.branches[branch] = list(repo.branches["main"])
        self.json({})

    # ---- uploads

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        wanted = json.loads(self.body())["files"]
        if not self.may_write(repo.owner):
            return self.refuse(403, "You don't have the rights to write to this repository")
        there, limit, files = (repo.find(revision) or ("", {}))[1], self.hub.lfs_above, []
        for file in wanted:
            mode = "lfs" if limit is not None and file["size"] > limit else "regular"
            blob = there.get(file["path"])
            oid = None if blob is None else (blob.sha256 if blob.lfs else blob.git_oid)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files})

    def lfs_batch(self, name: str) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        wanted = json.loads(self.body())
        if not self.may_write(repo.owner):
            return self.refuse(403, "no right to upload")
        objects = []
        for one in wanted["objects"]:
            oid = one["oid"]
            actions = {
                "upload": {"href": f"{self.hub.url}/_large/{oid}", "header": {}},
                "verify": {"href": f"{self.hub.url}/_verify", "header": {}},
            }
            objects.append({**one, **({} if oid in self.hub.large else {"actions": actions})})
        self.json({"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        data = self.body(self.hub.cut_upload)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "the bytes are not those of the hash")
        self.hub.large[oid] = data
        self.answer(200, b"")

    def verify(self) -> None:
        wanted = json.loads(self.body())
        self.answer(200 if len(self.hub.large.get(wanted["oid"], b"")) == wanted["size"] else 404, b"")

    def xet_token(self, name: str) -> None:
        if not self.may_write(name.partition("/")[0]):
            return self.refuse(403, "no right to upload")
        self.json({"accessToken": "t", "exp": 1 << 40, "casUrl": self.hub.store})

    def commit(self, name: str, branch: str) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        if self.hub.cut_commit == "before":
            self.body(100)
        lines = [json.loads(line) for line in self.body().splitlines()]
        if not self.may_write(repo.owner):
            return self.refuse(403, "no right to commit")
        if branch not in repo.branches:
            return self.refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header = lines[0]["value"]
        head, files = repo.branches[branch][-1][:2]
        if header.get("parentCommit") not in (None, head):
            return self.refuse(412, "A commit has happened since.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.refuse(400, f"LFS pointer to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            else:
                del files[value["path"]]
        oid = repo.commit(branch, files, header["summary"])
        if self.hub.cut_commit == "after":
            raise _Cut
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    # ---- downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo_of(name)
        if repo is None:
            return
        found = repo.find(revision)
        if found is None:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit, blob = found[0], found[1].get(path)
        if blob is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not blob.lfs:
            return self.answer(200, blob.data, ETag=f'"{blob.git_oid}"', X_Repo_Commit=commit)
        # large files come from another host, which gets no token
        place = self.hub.url.replace("127.0.0.1", "localhost") + f"/_large/{blob.sha256}"
        linked = {"X_Linked_ETag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.data))}
        self.answer(302, b"", Location=place, X_Repo_Commit=commit, **linked)

    def send_large(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            return self.refuse(400, "a token was sent to another host")
        self.answer(200, self.hub.large[oid], ETag=f'"{oid}"')


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/repos/delete", ("DELETE",), _Handler.delete),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (rf"/api/models/{_ID}", ("GET",), _Handler.info),
    (rf"/api/models/{_ID}/revision/(.+)", ("GET",), _Handler.info),
    (rf"/api/models/{_ID}/branch/(.+)", ("POST", "DELETE"), _Handler.branch),
    (rf"/api/models/{_ID}/preupload/(.+)", ("POST",), _Handler.preupload),
    (rf"/{_ID}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/_large/(\w+)", ("PUT",), _Handler.receive),
    (r"/_large/(\w+)", ("GET", "HEAD"), _Handler.send_large),
    (r"/_verify", ("POST",), _Handler.verify),
    (rf"/api/models/{_ID}/xet-write-token/.+", ("GET",), _Handler.xet_token),
    (rf"/api/models/{_ID}/commit/(.+)", ("POST",), _Handler.commit),
    (rf"/{_ID}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), _Handler.resolve),
]


@contextlib.contextmanager
def hub_standin(**options) -> Iterator[Hub]:
    """A stand-in that runs until the block ends. options: of `Hub`."""
    hub = Hub(**options)
    handler = type("Handler", (_Handler,), {"hub": hub})

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
