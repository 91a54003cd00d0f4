"""A Hugging Face hub on this machine: enough of its HTTP interface for data sets and models to be loaded by name.

Tests point `HF_ENDPOINT` at it, in a process of their own (the library reads the address when it is imported), so that
loading by name runs the real client against real requests without a network.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path], requests: list[str] | None = None) -> Iterator[str]:
    """Serve folders as `datasets/OWNER/NAME` or `models/OWNER/NAME`, every revision the same; gives the address.

    `requests` is given a line for each.
    """

    class Handler(_Handler):
        folders = repositories

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            if requests is not None:
                requests.append(f"{self.command} {self.path} {code}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folders: dict[str, Path]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._about(f"{match[1]}/{match[2]}")
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self._tree(f"{match[1]}/{match[2]}", match[3], "recursive" in parse_qs(address.query))
        elif match := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(f"{match[1] or 'models'}/{match[2]}", match[3])
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/[^/]+", unquote(urlsplit(self.path).path)
        )
        folder = self.folders.get(f"{match[1]}/{match[2]}") if match else None
        if folder is None:
            self._missing("RepoNotFound")
            return
        text = body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        self._json([_entry(folder, folder / name) for name in wanted if (folder / name).exists()])

    def _about(self, repository: str) -> None:
        folder = self.folders.get(repository)
        if folder is None:
            self._missing("RepoNotFound")
            return
        files = [{"rfilename": str(file.relative_to(folder))} for file in sorted(folder.rglob("*")) if file.is_file()]
        name = repository.partition("/")[2]
        self._json({"_id": "0", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                    "downloads": 0, "likes": 0, "tags": [], "siblings": files})  # fmt: skip

    def _tree(self, repository: str, inside: str, recursive: bool) -> None:
        folder = self.folders.get(repository)
        if folder is None or not (folder / inside).is_dir():
            self._missing("EntryNotFound" if folder else "RepoNotFound")
            return
        found = (folder / inside).rglob("*") if recursive else (folder / inside).iterdir()
        self._json([_entry(folder, path) for path in sorted(found)])

    def _file(self, repository: str, name: str) -> None:
        file = self.folders.get(repository, Path("/nonexistent")) / name
        if not file.is_file():
            self._missing("EntryNotFound" if repository in self.folders else "RepoNotFound")
            return
        self._answer(200, file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "oid": COMMIT, "size": 0, "path": name}
    return {"type": "file", "oid": _digest(path), "size": path.stat().st_size, "path": name}


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
