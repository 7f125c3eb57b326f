"""A server that speaks Google Cloud Storage's XML API: moto's of S3, with Google's numbers of versions.

Both have the same requests but for conditional writes: Google's name the version by a number, its generation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class _Google:
    """A WSGI application: Google's headers -> S3's, and back."""

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._tags: dict[str, str] = {}

    def __call__(self, request: dict[str, Any], start: Any) -> Iterable[bytes]:
        """Answer a request."""
        generation = request.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        if generation == "0":
            request["HTTP_IF_NONE_MATCH"] = "*"
        elif generation is not None:
            request["HTTP_IF_MATCH"] = self._tags.get(generation, "none")
        request["HTTP_AUTHORIZATION"] = _SIGNED

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            tag = next((value for name, value in headers if name.lower() == "etag"), None)
            if tag is not None:
                number = str(int(tag.strip('"')[:15], 16))
                self._tags[number] = tag
                headers = [*headers, ("x-goog-generation", number)]
            return start(status, headers, *error)

        return self._s3(request, answer)


@contextmanager
def google_server() -> Iterator[str]:
    """The address of a server, whose buckets are those of moto in this process."""
    server = make_server("127.0.0.1", 0, _Google(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
