"""Reading and writing of files by address: a local path, file:// or s3://.

S3 is configured as for botocore: credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, `AWS_REGION`, `AWS_ENDPOINT_URL` ...), a profile or the machine's role only, and no message contains
them. `AWS_NO_SIGN_REQUEST=YES` is for public buckets.

Requests that fail for a transient reason (500, 503 SlowDown, a timeout, a lost connection) are retried a bounded number
of times with increasing waits (`AWS_MAX_ATTEMPTS` and `AWS_RETRY_MODE` are botocore's).
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote
from uuid import uuid4

import fsspec
import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from scalenet_ray.core.errors import UserError

__all__ = [
    "Address",
    "RangeFile",
    "as_arrow",
    "atomic_writer",
    "delete",
    "exists",
    "join",
    "list_files",
    "local_path",
    "read_bytes",
    "read_tagged",
    "write_bytes_atomic",
    "write_if_unchanged",
]

Address = str | os.PathLike[str]


_LOST_RACES = ("PreconditionFailed", "ConditionalRequestConflict")
"""S3's error codes for a conditional write that lost against another writer."""

_S3_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
_S3_ATTEMPTS = 4
_S3_READ_ATTEMPTS = 3


def _s3() -> AbstractFileSystem:
    """Return the S3 file system; fsspec caches one per configuration."""
    unsigned = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "on", "true", "yes")
    # "standard" is exponential backoff with jitter; the user's environment takes precedence.
    retries: dict[str, str | int] = {} if "AWS_RETRY_MODE" in os.environ else {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _S3_ATTEMPTS
    settings = {**_S3_TIMEOUTS, "retries": retries}
    # Other processes write to the same place: a cached listing would be stale.
    store = fsspec.filesystem("s3", anon=unsigned, use_listings_cache=False, config_kwargs=settings)
    # s3fs's own retries cover responses that break off while they are read, but multiply botocore's.
    store.retries = _S3_READ_ATTEMPTS
    return store


def _locate(uri: Address) -> tuple[AbstractFileSystem, str]:
    """Split an address into its file system and the path in it; local paths become absolute."""
    text = os.fspath(uri)
    if not text.strip():
        msg = f"an address must be a path, file:// or s3://, got {text!r}: name a file or folder"
        raise UserError(msg)
    scheme, separator, rest = text.partition("://")
    if text.startswith("s3:") and not separator:
        rest, scheme, separator = "", "s3", "://"
    if not separator or scheme == "file":
        # Not fsspec's own parsing: it takes "::" in a file name for a chain of file systems.
        path = _path_of_file_address(rest) if separator else os.path.expanduser(text)
        return fsspec.filesystem("file"), os.path.abspath(path)
    if scheme != "s3":
        msg = f"an address must be a local path, file:// or s3://, got {scheme}://: copy the files to one of these"
        raise UserError(msg)
    if not rest.partition("/")[0].strip():
        msg = f"an s3:// address must name a bucket, got {text}: write s3://BUCKET/KEY (is a variable unset?)"
        raise UserError(msg)
    if "@" in rest.partition("/")[0]:
        # The message must not contain the address: it holds a secret.
        msg = "an s3:// address must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise UserError(msg)
    return _s3(), rest


def _path_of_file_address(rest: str) -> str:
    """Convert the part of an address after file:// to a path; %20 is a space, unless a file has that name."""
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return path if os.path.exists(path) else unquote(path)


def _is_s3(store: AbstractFileSystem) -> bool:
    return "s3" in store.protocol


@contextmanager
def _explained(verb: str, uri: Address, store: AbstractFileSystem) -> Iterator[None]:
    """Reraise errors with a message that says what to do, without their cause: a server's text may contain a key."""
    try:
        yield
    except FileNotFoundError:
        place = "the bucket and key, and AWS_ENDPOINT_URL" if _is_s3(store) else "the path"
        msg = f"cannot {verb} {os.fspath(uri)}: there is no such file or folder; check {place}"
        raise FileNotFoundError(msg) from None
    except IsADirectoryError:
        msg = f"cannot {verb} {os.fspath(uri)}: it is a folder; name a file in it"
        raise IsADirectoryError(msg) from None
    except NotADirectoryError:
        msg = f"cannot {verb} {os.fspath(uri)}: a part of the path is a file, not a folder; check the path"
        raise NotADirectoryError(msg) from None
    except FileExistsError as error:
        msg = f"cannot {verb} {os.fspath(uri)}: {error.filename or 'a part of the path'} is a file; name a folder"
        raise FileExistsError(msg) from None
    except PermissionError:
        remedy = "check the credentials in the environment" if _is_s3(store) else "check its owner and mode"
        msg = f"cannot {verb} {os.fspath(uri)}: access is denied; {remedy}"
        raise PermissionError(msg) from None
    except Exception as error:
        if not _is_s3(store) or isinstance(error, UserError):
            raise
        msg = f"cannot {verb} {os.fspath(uri)}: {_s3_reason(error)}"
        raise OSError(msg) from None


def _s3_reason(error: Exception) -> str:
    from botocore.exceptions import ConnectionError as NoConnectionError
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return f"no credentials; set {keys}, or AWS_NO_SIGN_REQUEST=YES for a public bucket"
    if isinstance(error, HTTPClientError | NoConnectionError):
        return "the endpoint cannot be reached; check AWS_ENDPOINT_URL and the network"
    if isinstance(error, ValueError):
        return f"{error}; check the address and AWS_ENDPOINT_URL"
    return f"S3 failed with {type(error).__name__}; check the address, AWS_REGION and the service"


def join(base: Address, *parts: str) -> str:
    """Join path components below `base`; a leading slash of a part is ignored."""
    return "/".join([os.fspath(base).rstrip("/"), *(part.strip("/") for part in parts)])


def as_arrow(uri: Address) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return an address as an Arrow file system and the path in it, for libraries that do their own I/O."""
    store, path = _locate(uri)
    if _is_s3(store):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store)), path
    return pyarrow.fs.LocalFileSystem(), path


def local_path(uri: Address) -> str | None:
    """Return the absolute path of a local address; None for S3."""
    store, path = _locate(uri)
    return None if _is_s3(store) else path


def exists(uri: Address) -> bool:
    """Return True if there is a file or folder at `uri`."""
    store, path = _locate(uri)
    with _explained("look for", uri, store):
        return store.exists(path)


def read_bytes(uri: Address, *, max_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Args:
        uri: the file.
        max_bytes: size limit, checked before the file is read; None for no limit.

    Raises:
        FileNotFoundError: if it does not exist.
        PermissionError: if it may not be read.
        OSError: if the store fails otherwise.
        UserError: if it is larger than `max_bytes`.
    """
    store, path = _locate(uri)
    with _explained("read", uri, store):
        if max_bytes is not None:
            _check_size(uri, cast(int, store.info(path)["size"]), max_bytes)
        if _is_s3(store):
            # One request: s3fs does not retry one of several concurrent ranges.
            return cast(bytes, store.cat_file(path, max_concurrency=1))
        with open(path, "rb") as handle:
            # The limit also holds for files that grow meanwhile, and for endless devices.
            data = handle.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None:
            _check_size(uri, len(data), max_bytes)
        return data


_READ_AHEAD_BYTES = 2**18
"""Bytes that a ranged request to S3 fetches beyond those asked for: the tiles of a TIFF lie one after the other."""


class RangeFile(io.RawIOBase):
    """A file of which parts are read, on S3 by ranged requests.

    Args:
        uri: the file.

    Raises:
        FileNotFoundError: if it does not exist.
        PermissionError: if it may not be read.
        OSError: if the store fails otherwise, also from `read`.
    """

    def __init__(self, uri: Address) -> None:
        self._uri = uri
        self._store, path = _locate(uri)
        with _explained("read", uri, self._store):
            if _is_s3(self._store):
                opened = self._store.open(path, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
            else:
                opened = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._handle = cast(IO[bytes], opened)

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; all that are left if it is negative."""
        with _explained("read", self._uri, self._store):
            return self._handle.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset; returns the new position."""
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._handle.tell()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()
        super().close()


def _check_size(uri: Address, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        msg = f"{os.fspath(uri)} may have {max_bytes} bytes, got {size}: split or shrink it, if it is the right one"
        raise UserError(msg)


@contextmanager
def atomic_writer(uri: Address) -> Iterator[IO[bytes]]:
    """Open `uri` for writing bytes; the file appears, or is replaced, atomically when the block ends.

    Folders are created as needed. If the block raises, the previous file remains.

    Raises:
        PermissionError: if it may not be written.
        OSError: if the store fails otherwise.
    """
    store, path = _locate(uri)
    with _s3_writer(uri, store, path) if _is_s3(store) else _local_writer(uri, store, path) as handle:
        yield handle


@contextmanager
def _s3_writer(uri: Address, store: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    with _explained("write", uri, store):
        handle = cast(AbstractBufferedFile, store.open(path, "wb", autocommit=False))
    try:
        yield cast(IO[bytes], handle)
        with _explained("write", uri, store):
            handle.close()
            handle.commit()
    except BaseException:
        handle.discard()
        # Otherwise the finaliser retries the upload.
        handle.closed = True
        raise


@contextmanager
def _local_writer(uri: Address, store: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    folder, _ = os.path.split(path)
    # Hidden, so that it is not listed as data; in the same folder, so that the replacement is atomic.
    scratch = os.path.join(folder, f".{uuid4().hex}.part")
    with _explained("write", uri, store):
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            msg = f"cannot write {os.fspath(uri)}: a pipe, a socket or a device is there; name another file"
            raise OSError(msg)
        os.makedirs(folder, exist_ok=True)
        handle = open(scratch, "xb")  # noqa: SIM115 - closed below, before it is moved
    try:
        with handle:
            yield handle
        with _explained("write", uri, store):
            os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_bytes_atomic(uri: Address, data: bytes) -> None:
    """Write a whole file atomically: a reader sees the old content or the new one.

    Raises:
        PermissionError: if it may not be written.
        OSError: if the store fails otherwise.
    """
    with atomic_writer(uri) as handle:
        handle.write(data)


def read_tagged(uri: Address) -> tuple[bytes, str]:
    """Read an S3 object with the ETag of its version; raises as `read_bytes` does."""
    store, path = _locate(uri)
    bucket, _, key = path.partition("/")
    with _explained("read", uri, store):
        info = cast(Any, store).call_s3("head_object", Bucket=bucket, Key=key)
        return cast(bytes, store.cat_file(path)), info["ETag"]


def write_if_unchanged(uri: Address, data: bytes, tag: str | None) -> str | None:
    """Write an S3 object by compare-and-swap: of several concurrent writers one succeeds.

    Args:
        uri: its s3:// address.
        data: its content.
        tag: ETag of the version to replace; None if the object must not exist yet.

    Returns:
        The new version's ETag; None if the object has changed or is gone.

    Raises:
        OSError: if the store fails, or does not support conditional writes.
    """
    store, path = _locate(uri)
    bucket, _, key = path.partition("/")
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    with _explained("write", uri, store):
        try:
            written = cast(Any, store).call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return written["ETag"]
        except OSError as error:
            response = getattr(error.__cause__ or error, "response", {})
            if response.get("Error", {}).get("Code") in _LOST_RACES:
                return None
            if isinstance(error, FileNotFoundError) and tag is not None:
                return None
            raise


def delete(uri: Address) -> None:
    """Delete an existing file."""
    store, path = _locate(uri)
    with _explained("delete", uri, store):
        store.rm_file(path)


def list_files(uri: Address, suffixes: Sequence[str] = ()) -> list[str]:
    """List the files below a folder or S3 prefix, matching a glob, or the single file named.

    Hidden files and folders (names that start with a dot) are skipped, and links to folders are not followed.

    Args:
        uri: a file, a folder (listed with its subfolders), or a glob with `*`, `?`, `[...]` or `**`.
        suffixes: lower-case endings to keep, with their dot, compared without regard to case; () keeps all.

    Returns:
        Sorted addresses; local ones are absolute paths. [] if nothing matches.

    Raises:
        FileNotFoundError: if `uri` is not a glob and does not exist.
    """
    store, path = _locate(uri)
    with _explained("list", uri, store):
        base = path.rstrip("/")
        if any(mark in path for mark in "*?[") and not store.exists(path):
            found = cast(dict[str, dict], store.glob(path, detail=True))
            names = [name for name, info in found.items() if info["type"] != "directory"]
            base = base[: min(base.find(mark) % (len(base) + 1) for mark in "*?[")].rpartition("/")[0]
        else:
            names = cast(list[str], store.find(path))
            if not names and not store.exists(path):
                raise FileNotFoundError(path)
    kept = [name for name in names if _is_listed(name, base, tuple(suffixes))]
    return sorted(f"s3://{name}" if _is_s3(store) else name for name in kept)


def _is_listed(name: str, base: str, suffixes: tuple[str, ...]) -> bool:
    below = name[len(base) :] if name != base else posixpath.basename(name)
    hidden = any(part.startswith(".") for part in below.split("/"))
    return not hidden and (not suffixes or name.lower().endswith(suffixes))
