"""A server that answers as the Hugging Face Hub does for one public data set, whose files lie in a folder."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATASET = "owner/photos"
_ID = {"oid": "0" * 40}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
    return {**_ID, **kind, "path": path.relative_to(folder).as_posix()}


def _handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the description of the data set, a listing, or a file."""
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            if listed := re.fullmatch(rf"/api/datasets/{DATASET}/tree/[^/]+/?(.*)", path):
                place, deep = folder / listed[1], query.get("recursive", [""])[0].lower() in ("true", "1")
                found = sorted(place.rglob("*") if deep else place.glob("*")) if place.is_dir() else None
                self._answer(None if found is None else [_entry(folder, each) for each in found])
            elif re.fullmatch(rf"/api/datasets/{DATASET}(/revision/[^/]+)?", path):
                self._answer({"id": DATASET, "sha": "0" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0})
            elif file := re.fullmatch(rf"/datasets/{DATASET}/resolve/[^/]+/(.+)", path):
                self._send_file(folder / file[1])
            else:
                self._answer(None)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            """Describe the paths that are asked for, as far as they are there."""
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self._answer([_entry(folder, folder / path) for path in paths if (folder / path).exists()])

        def _send_file(self, path: Path) -> None:
            if not path.is_file():
                self._answer(None)
                return
            data = path.read_bytes()
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(part[1]), min(int(part[2] or len(data)), len(data) - 1)) if part else (0, len(data) - 1)
            span = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if part else {}
            self._send(206 if part else 200, data[first : last + 1], {**span, "ETag": '"0"', "X-Repo-Commit": "0" * 40})

        def _answer(self, content: Any) -> None:
            """Send JSON; of None that the data set, or the file in it, is not there."""
            code = "EntryNotFound" if DATASET in self.path else "RepoNotFound"
            if content is None:
                self._send(404, json.dumps({"error": code}).encode(), {"X-Error-Code": code})
            else:
                self._send(200, json.dumps(content).encode(), {})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler


@contextmanager
def hub_server(folder: Path) -> Iterator[str]:
    """The address of a server of `DATASET`, with the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
