"""A stand-in for Google Cloud Storage: one bucket, as TensorStore sees it over HTTP and etils through fsspec."""

import io
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

OBJECTS = "/storage/v1/b/bucket/o"


class BucketServer(ThreadingHTTPServer):
    """Serves `gs://bucket`, kept in memory: objects appear whole, cannot be appended to, and there are no folders."""

    daemon_threads = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start serving, and direct this process's requests for Google's storage to this server."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.written: list[str] = []
        """Names, in the order they were written."""
        self.is_full = False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{self.server_port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anybody")
        files, others = _Files(self), fsspec.filesystem
        monkeypatch.setattr(fsspec, "filesystem", lambda name, **k: files if name == "gcs" else others(name, **k))
        # Orbax only asks Google's client library whether the bucket supports folders.
        bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)
        client = types.SimpleNamespace(get_bucket=lambda name: bucket)
        storage = types.SimpleNamespace(Client=lambda: client)
        monkeypatch.setitem(sys.modules, "google.cloud", types.SimpleNamespace(storage=storage))

    def write(self, name: str, content: bytes) -> None:
        """Store an object; a full bucket refuses."""
        if self.is_full:
            raise OSError("the bucket's quota is used up")
        self.objects[name] = content
        self.written.append(name)


class _Files(fsspec.AbstractFileSystem):
    """The bucket, for fsspec."""

    cachable = False
    protocol = "gs"

    def __init__(self, bucket: BucketServer) -> None:
        super().__init__()
        self._bucket = bucket

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        asked = self._strip_protocol(path)
        found: dict[str, dict[str, Any]] = {}
        for name, content in self._bucket.objects.items():
            full = f"bucket/{name}"
            if full == asked:
                found[full] = {"name": full, "size": len(content), "type": "file"}
            elif full.startswith(f"{asked}/"):
                child, _, below = full.removeprefix(f"{asked}/").partition("/")
                kind, size = ("directory", 0) if below else ("file", len(content))
                found[f"{asked}/{child}"] = {"name": f"{asked}/{child}", "size": size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: Any = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        name = path.removeprefix("bucket/")
        if mode == "wb":
            return _Upload(self._bucket, name)
        assert mode == "rb", f"an object store has no mode {mode}"
        if name not in self._bucket.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self._bucket.objects[name])

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        asked = str(self._strip_protocol(path)).removeprefix("bucket/")
        names = [n for n in self._bucket.objects if n == asked or (recursive and n.startswith(f"{asked}/"))]
        if not names:
            raise FileNotFoundError(path)
        for name in names:
            del self._bucket.objects[name]

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing to do: there are no folders."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to do: there are no folders."""

    def rmdir(self, path: str) -> None:
        """Nothing to do: there are no folders."""


class _Upload(io.BytesIO):
    """An object that is stored when it is closed."""

    def __init__(self, bucket: BucketServer, name: str) -> None:
        super().__init__()
        self._bucket, self._name = bucket, name

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._bucket.write(self._name, content)


class _Handler(BaseHTTPRequestHandler):
    """The bucket, for TensorStore: the part of the JSON API that it uses."""

    protocol_version = "HTTP/1.1"

    @property
    def bucket(self) -> BucketServer:
        assert isinstance(self.server, BucketServer)
        return self.server

    def do_GET(self) -> None:
        path, options = self._asked()
        if path == OBJECTS:
            prefix, first = options.get("prefix", ""), options.get("startOffset", "")
            names = sorted(name for name in self.bucket.objects if name.startswith(prefix) and name >= first)
            self._answer(200, json.dumps({"items": [{"name": name} for name in names]}).encode())
        elif (content := self.bucket.objects.get(_name(path))) is None:
            self._answer(404)
        elif (wanted := self.headers.get("Range")) is None:
            self._answer(200, content)
        else:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._answer(206, part, ("Content-Range", place))

    def do_POST(self) -> None:
        path, options = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert path == f"/upload{OBJECTS}", path
        try:
            self.bucket.write(options["name"], content)
            self._answer(200, json.dumps({"name": options["name"], "generation": "1"}).encode())
        except OSError as error:
            self._answer(403, json.dumps({"error": {"message": str(error)}}).encode())

    def do_DELETE(self) -> None:
        found = self.bucket.objects.pop(_name(self._asked()[0]), None)
        self._answer(404 if found is None else 204)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _answer(self, status: int, content: bytes = b"", *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(content))), ("x-goog-generation", "1"), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _name(path: str) -> str:
    return unquote(path.removeprefix(f"{OBJECTS}/"))
