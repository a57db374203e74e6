"""A model hub on loopback: the part of the hub's resolve protocol that `huggingface_hub` uses to download a file.

Large files are announced by their sha256 and redirected to another host, as those in the real hub's large-file storage
are; small ones come directly, under a git-like tag. Faults can be switched on per file. It does not
support revisions, tokens and listings.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_STORAGE = "storage"


class HubServer(ThreadingHTTPServer):
    """Serves `files`; notes every request in `requests`. All names are `OWNER/REPOSITORY/FILE`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.small: set[str] = set()
        """Files that come directly, without a sha256."""
        self.statuses: dict[str, int] = {}
        """Files whose requests all fail with this status."""
        self.sent_instead: dict[str, bytes] = {}
        """Contents that are sent under the announcement of the right ones."""
        self.breaks: dict[str, list[int]] = {}
        """Bytes after which the connection breaks, one number for each of the next downloads."""
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://localhost:{self.server_port}/{_STORAGE}"

    def downloads(self) -> list[str]:
        """Return the files whose contents were asked for, in order; a resumed one once more each time."""
        return [name for method, name in self.requests if method == "GET"]


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
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean; `requests` has the log."""

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path).lstrip("/")
        stored = path.startswith(f"{_STORAGE}/")
        name = path.removeprefix(f"{_STORAGE}/").replace("/resolve/main/", "/", 1)
        self.server.requests.append((self.command, name))
        if name in self.server.statuses:
            self._send(self.server.statuses[name], {})
        elif name not in self.server.files:
            has_repository = any(_repository(file) == _repository(name) for file in self.server.files)
            self._send(404, {"X-Error-Code": "EntryNotFound" if has_repository else "RepoNotFound"})
        elif stored or name in self.server.small:
            self._send_content(name, with_body)
        else:
            content = self.server.files[name]
            announced = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
            self._send(302, {**announced, "Location": f"{self.server.storage_url}/{name}"})

    def _send_content(self, name: str, with_body: bool) -> None:
        right = self.server.files[name]
        content = self.server.sent_instead.get(name, right)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(right).hexdigest()}"',
            "Content-Length": str(len(content) - start),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if with_body else b""
        if with_body and self.server.breaks.get(name):
            body = body[: self.server.breaks[name].pop(0)]
        self._send(206 if start else 200, headers, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def _repository(name: str) -> list[str]:
    return name.split("/")[:2]
