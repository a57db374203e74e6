"""A model hub on loopback: the part of the hub's protocol with which `huggingface_hub` downloads and uploads files.

Large files are announced by their sha256 and redirected to another host, as those in the real hub's large-file storage
are; small ones come directly, under a git-like tag. Uploads go through the same steps as to the real hub: create the
repository, ask how each file is sent, send the large ones, and commit everything at once. Faults can be switched on per
file or step.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = (".pt", ".safetensors", ".npz")
_STORAGE = "storage"
_REPOSITORY = "([^/]+/[^/]+)"


class HubServer(ThreadingHTTPServer):
    """Serves `files`, of main branches, and `branches`; notes every request in `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        """`OWNER/REPOSITORY/FILE` -> its content on the main branch."""
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        """Repository and branch -> its files."""
        self.commits: dict[str, dict[str, bytes]] = {}
        """Commits that were announced so far -> their files."""
        self.repositories: set[str] = set()
        """Repositories that exist without a file, too."""
        self.private: set[str] = set()
        """Repositories that only a request with `TOKEN` sees."""
        self.gated: set[str] = set()
        self.messages: list[str] = []
        """First lines of the commits that were made."""
        self.stored: dict[str, bytes] = {}
        """sha256 -> content of the large files that were uploaded."""
        self.small: set[str] = set()
        """Files that come directly, without a sha256, though their ending is a large file's."""
        self.statuses: dict[str, int] = {}
        """Files, and the steps create, preupload, upload and commit, whose requests all fail with this status."""
        self.sent_instead: dict[str, bytes] = {}
        """Contents that are sent under the announcement of the right ones."""
        self.breaks: dict[str, list[int]] = {}
        """Bytes after which the connection breaks, one number for each of the next downloads."""
        self.commit_before: dict[str, bytes] = {}
        """Files that someone else commits just before the next commit, by `OWNER/REPOSITORY/FILE`."""
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.server_port}/{_STORAGE}"

    def downloads(self) -> list[str]:
        """Return the files whose contents were asked for, in order; a resumed one once more each time."""
        return [name for method, name in self.requests if method == "GET" and not name.startswith("api/")]

    def exists(self, repository: str) -> bool:
        return repository in self.repositories or any(name.startswith(f"{repository}/") for name in self.files)

    def tree(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or commit."""
        if revision == "main":
            start = f"{repository}/"
            return {name.removeprefix(start): file for name, file in self.files.items() if name.startswith(start)}
        return self.branches.get((repository, revision), self.commits.get(revision))

    def commit(self, repository: str, revision: str = "main") -> str:
        """Return the commit of a branch as it is now."""
        if revision in self.commits:
            return revision
        files = self.tree(repository, revision) or {}
        content = repr([repository, *((name, hashlib.sha1(files[name]).hexdigest()) for name in sorted(files))])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit

    def replace(self, repository: str, revision: str, files: dict[str, bytes]) -> None:
        """Make these the files of a branch."""
        if revision != "main":
            self.branches[repository, revision] = files
            return
        others = {name: file for name, file in self.files.items() if not name.startswith(f"{repository}/")}
        self.files = others | {f"{repository}/{name}": file for name, file in files.items()}

    def is_large(self, repository: str, name: str) -> bool:
        return name.endswith(LARGE) and f"{repository}/{name}" not in self.small


@contextmanager
def running_server() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean; `requests` has the log."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path.lstrip("/")
        self.body = self._read_body()
        for pattern, route in _ROUTES:
            if found := re.fullmatch(pattern, path):
                route(self, *map(unquote, found.groups()))
                return
        raise AssertionError(f"{self.command} {path}: the hub of the tests does not know this request")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _asked(self, name: str, step: str = "") -> bool:
        """Note a request; return whether it is to fail, having answered it then."""
        self.server.requests.append((self.command, name))
        status = self.server.statuses.get(step or name)
        if status is not None:
            self._send(status, {})
        return status is not None

    def _is_hidden(self, repository: str, revision: str = "main") -> bool:
        """Return whether the client may not or cannot see a revision, having answered the request then."""
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository in self.server.gated and not authorized:
            self._send(403, {"X-Error-Code": "GatedRepo"})
        elif not self.server.exists(repository) or (repository in self.server.private and not authorized):
            self._send(404 if authorized else 401, {"X-Error-Code": "RepoNotFound"})
        elif self.server.tree(repository, revision) is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _is_refused(self) -> bool:
        """Return whether the client may not write, having answered the request then."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._send(401, {"X-Error-Message": "Invalid username or password."})
        return True

    # Downloads

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        if self._asked(f"{repository}/{name}") or self._is_hidden(repository, revision):
            return
        files = self.server.tree(repository, revision) or {}
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif not self.server.is_large(repository, name):
            self._send_content(repository, revision, name, files[name])
        else:
            announced = {
                "X-Repo-Commit": self.server.commit(repository, revision),
                "X-Linked-Etag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
                "X-Linked-Size": str(len(files[name])),
            }
            place = f"{self.server.storage_url}/{repository}/{self.server.commit(repository, revision)}/{name}"
            self._send(302, {**announced, "Location": place})

    def _from_storage(self, repository: str, commit: str, name: str) -> None:
        if not self._asked(f"{repository}/{name}"):
            self._send_content(repository, commit, name, self.server.commits[commit][name])

    def _send_content(self, repository: str, revision: str, name: str, right: bytes) -> None:
        content = self.server.sent_instead.get(f"{repository}/{name}", right)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {
            "X-Repo-Commit": self.server.commit(repository, revision),
            "ETag": f'"{_git_oid(right)}"',
            "Content-Length": str(len(content) - start),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if self.command == "GET" else b""
        breaks = self.server.breaks.get(f"{repository}/{name}")
        if self.command == "GET" and breaks:
            body = body[: breaks.pop(0)]
        self._send(206 if start else 200, headers, body)

    def _info(self, repository: str, revision: str = "main") -> None:
        if self._asked(f"api/{repository}") or self._is_hidden(repository, revision):
            return
        names = self.server.tree(repository, revision) or {}
        self._send_json(
            {
                "id": repository,
                "sha": self.server.commit(repository, revision),
                "private": repository in self.server.private,
                "siblings": [{"rfilename": name} for name in names],
            }
        )

    def _tree(self, repository: str, revision: str) -> None:
        if not self._asked(f"api/{repository}/tree") and not self._is_hidden(repository, revision):
            files = self.server.tree(repository, revision) or {}
            self._send_json([self._entry(repository, name, file) for name, file in sorted(files.items())])

    def _entry(self, repository: str, name: str, file: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(file), "oid": _git_oid(file)}
        if self.server.is_large(repository, name):
            entry["lfs"] = {"oid": hashlib.sha256(file).hexdigest(), "size": len(file), "pointerSize": 134}
        return entry

    # Uploads

    def _who(self) -> None:
        if not self._asked("api/whoami") and not self._is_refused():
            self._send_json({"name": "user", "type": "user", "orgs": []})

    def _create(self) -> None:
        if self._asked("api/create", "create") or self._is_refused():
            return
        asked = json.loads(self.body)
        repository = f"{asked['organization']}/{asked['name']}"
        status = 409 if self.server.exists(repository) else 200
        if status == 200:
            self.server.repositories.add(repository)
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(repository)
        self._send_json({"url": f"{self.server.url}/{repository}"}, status)

    def _branch(self, repository: str, branch: str) -> None:
        if self._asked("api/branch") or self._is_refused():
            return
        exists = branch == "main" or (repository, branch) in self.server.branches
        if not exists:
            self.server.branches[repository, branch] = self.server.tree(repository, "main") or {}
        self._send_json({}, 409 if exists else 200)

    def _card(self) -> None:
        content = json.loads(self.body)["content"]
        wrong = not content.startswith("---\n") or "license: no licence" in content
        errors = [{"message": '"license" must be one of […]'}] if wrong else []
        self._send_json({"errors": errors}, 400 if wrong else 200)

    def _preupload(self, repository: str, revision: str) -> None:
        if self._asked("api/preupload", "preupload") or self._is_refused():
            return
        there = self.server.tree(repository, revision) or {}
        answers = []
        for file in json.loads(self.body)["files"]:
            large, content = self.server.is_large(repository, file["path"]), there.get(file["path"])
            oid = hashlib.sha256(content).hexdigest() if content and large else _git_oid(content) if content else None
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def _batch(self, repository: str) -> None:
        if self._asked(f"api/{repository}/batch") or self._is_refused():
            return
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.stored:
                one["actions"] = {"upload": {"href": f"{self.server.storage_url}/{one['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if self._asked("upload"):
            return
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.stored[oid] = self.body
        self._send(200, {})

    def _commit(self, repository: str, revision: str) -> None:
        if self._asked("api/commit", "commit") or self._is_refused() or self._is_hidden(repository, revision):
            return
        self.server.files |= self.server.commit_before
        lines = [*map(json.loads, self.body.splitlines())]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, self.server.commit(repository, revision)):
            self._send(412, {"X-Error-Message": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(self.server.tree(repository, revision) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.server.stored[value["oid"]]
        self.server.replace(repository, revision, files)
        commit = self.server.commit(repository, revision)
        self._send_json({"commitUrl": f"{self.server.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _send_json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self._send(status, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


_ROUTES = (
    ("api/whoami-v2", _Handler._who),
    ("api/validate-yaml", _Handler._card),
    ("api/repos/create", _Handler._create),
    (f"api/models/{_REPOSITORY}", _Handler._info),
    (f"api/models/{_REPOSITORY}/revision/([^/]+)", _Handler._info),
    (f"api/models/{_REPOSITORY}/tree/([^/]+)", _Handler._tree),
    (f"api/models/{_REPOSITORY}/branch/([^/]+)", _Handler._branch),
    (f"api/models/{_REPOSITORY}/preupload/([^/]+)", _Handler._preupload),
    (f"api/models/{_REPOSITORY}/commit/([^/]+)", _Handler._commit),
    (rf"{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler._batch),
    (f"{_REPOSITORY}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (f"{_STORAGE}/([0-9a-f]{{64}})", _Handler._store),
    (f"{_STORAGE}/{_REPOSITORY}/([^/]+)/(.+)", _Handler._from_storage),
)


def _git_oid(content: bytes) -> str:
    """Return the id under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
