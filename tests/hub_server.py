"""A hub on loopback, as far as huggingface_hub asks one for a model: its API, and files by ranges."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_PIECE = 1 << 17
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model, OWNER/MODEL.

    Attributes:
        token: what a request must carry; None: nothing.
        pause: seconds between two pieces of a file.
        sent: bytes of files sent so far, by name.
        under_way: set once a megabyte of some file is sent.
    """

    daemon_threads = True

    def __init__(self, model: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.files = model, files
        self.token: str | None = None
        self.pause = 0.0
        self.sent: dict[str, int] = {}
        self.under_way = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif path.startswith(f"/api/models/{hub.model}"):
            self._api(path.removeprefix(f"/api/models/{hub.model}"))
        elif path.startswith(f"/{hub.model}/resolve/"):
            revision, _, name = path.removeprefix(f"/{hub.model}/resolve/").partition("/")
            self._file(revision, name, body)
        else:
            self._error(404, "RepoNotFound", "Repository not found")

    def _api(self, rest: str) -> None:
        kind, _, revision = rest.strip("/").partition("/")
        revision = revision.split("/")[0]
        if revision not in ("", "main", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if kind == "tree":
            tree = [(name, len(data), _etag(data)) for name, data in self.server.files.items()]
            self._json([{"type": "file", "path": name, "size": size, "oid": etag} for name, size, etag in tree])
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
        self._json({"id": self.server.model, "modelId": self.server.model, "sha": COMMIT, "siblings": siblings,
                    "private": False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _file(self, revision: str, name: str, body: bool) -> None:
        if revision not in ("main", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if name not in self.server.files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data = self.server.files[name]
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        range_ = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        for key, value in {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Content-Range": range_}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if body:
            self._send(name, data[begin:])

    def _send(self, name: str, data: bytes) -> None:
        try:
            for begin in range(0, len(data), _PIECE):
                self.wfile.write(data[begin : begin + _PIECE])
                self.server.sent[name] = self.server.sent.get(name, 0) + len(data[begin : begin + _PIECE])
                if self.server.sent[name] > 1 << 20:
                    self.server.under_way.set()
                time.sleep(self.server.pause)
        except OSError:  # whoever asked is gone
            self.close_connection = True

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_of(model: str, files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(model, files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
