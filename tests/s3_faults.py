"""A proxy in front of an S3 server that makes requests fail as networks and S3 do."""

from __future__ import annotations

import http.client
import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ANSWERS = {"internal error": (500, "InternalError"), "slow down": (503, "SlowDown")}
"""Faults that S3 tells of."""

BREAKS = ("no answer", "reset", "cut short", "stalled", "done and lost", "slow")
"""Faults of the way there and back. "done and lost": S3 did it, and its answer never came."""

_STALL_SECONDS = 2.5
_SECONDS_BETWEEN_PIECES = 0.05
_PIECES = 8


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on to the server `behind` it: one new request in `every` fails, and succeeds when it is made
    again.

    `injected` counts the faults that struck, `signed` the requests with credentials and without.
    """

    daemon_threads = True

    def __init__(self, behind: str, faults: Sequence[str], every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(behind)
        self.injected: Counter[str] = Counter()
        self.signed: Counter[bool] = Counter()
        self._turns = itertools.cycle(
            [*itertools.chain.from_iterable((fault, *[None] * (every - 1)) for fault in faults)]
        )
        self._struck: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, method: str, path: str, signed: bool) -> str | None:
        """What is to befall a request."""
        with self._lock:
            self.signed[signed] += 1
            if (method, path) in self._struck:
                self._struck.discard((method, path))
                return None
            fault = next(self._turns, None)
            if fault is not None:
                self._struck.add((method, path))
                self.injected[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what is wanted here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _work(self) -> None:
        body = self._body()
        fault = self.server.fault_of(self.command, self.path, "Authorization" in self.headers)
        if fault in ANSWERS:
            self._answer(*ANSWERS[fault])
        elif fault in ("no answer", "reset"):
            self._hang_up(reset=fault == "reset")
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _work  # noqa: N815

    def _body(self) -> bytes:
        if "100-continue" in self.headers.get("Expect", ""):
            self.send_response_only(100)
            self.end_headers()
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _answer(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault of a test</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closing with this set sends a reset in place of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        behind = http.client.HTTPConnection(self.server.behind.hostname or "", self.server.behind.port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Transfer-Encoding")}
        headers["Content-Length"] = str(len(body))
        behind.request(self.command, self.path, body, headers)
        reply = behind.getresponse()
        data = reply.read()
        behind.close()
        if fault == "done and lost":
            self._hang_up(reset=False)
            return
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(data, fault)

    def _send(self, data: bytes, fault: str | None) -> None:
        if fault == "slow":
            step = max(1, len(data) // _PIECES)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                time.sleep(_SECONDS_BETWEEN_PIECES)
        elif fault in ("cut short", "stalled"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stalled":
                time.sleep(_STALL_SECONDS)
            self._hang_up(reset=False)
        else:
            self.wfile.write(data)


@contextmanager
def faulty_s3(behind: str, faults: Sequence[str] = (), every: int = 1) -> Iterator[FaultyS3]:
    """A `FaultyS3` that listens until the block ends."""
    server = FaultyS3(behind, faults, every)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
