"""Files by their address: a local path, file:// or s3://, read and written alike.

S3 is reached as botocore does: credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, `AWS_REGION`, `AWS_ENDPOINT_URL` ...), a profile or the machine's role and from nowhere else, and no
message repeats them. `AWS_NO_SIGN_REQUEST=YES` asks for none: public buckets.

A request that fails for a passing reason (500, 503 SlowDown, a time-out, a connection that broke, in mid-answer too) is
made again after a wait that grows, a bounded number of times (`AWS_MAX_ATTEMPTS` and `AWS_RETRY_MODE` are botocore's).
"""

from __future__ import annotations

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
"""What S3 answers to a conditional write that came second."""


# A server that says nothing for so long is taken for lost, and asked again.
_S3_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}


_S3_ATTEMPTS = 4


_S3_ANSWERS = 3


def _s3() -> AbstractFileSystem:
    """The client, made once for each setting."""
    unsigned = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "on", "true", "yes")
    # "standard" waits longer each time, at random; what the user's environment asks for goes before.
    retries: dict[str, str | int] = {} if "AWS_RETRY_MODE" in os.environ else {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _S3_ATTEMPTS
    settings = {**_S3_TIMEOUTS, "retries": retries}
    # Other processes write to the same place: a listing remembered from earlier would be stale.
    store = fsspec.filesystem("s3", anon=unsigned, use_listings_cache=False, config_kwargs=settings)
    # Of s3fs's own, which fetches an answer again that breaks off while it is read, but also multiplies botocore's.
    store.retries = _S3_ANSWERS
    return store


def _locate(uri: Address) -> tuple[AbstractFileSystem, str]:
    """An address -> its file system and the path there; local paths become absolute."""
    text = os.fspath(uri)
    if not text.strip():
        msg = f"an address must be a path, file:// or s3://, got {text!r}: name a file or folder"
        raise UserError(msg)
    scheme, separator, rest = text.partition("://")
    if text.startswith("s3:") and not separator:
        rest, scheme, separator = "", "s3", "://"
    if not separator or scheme == "file":
        # Not fsspec's own parsing: a file's name may hold "::", which means a chain of file systems to it.
        path = _path_of_file_address(rest) if separator else os.path.expanduser(text)
        return fsspec.filesystem("file"), os.path.abspath(path)
    if scheme != "s3":
        msg = f"an address must be a local path, file:// or s3://, got {scheme}://: copy the files to one of these"
        raise UserError(msg)
    if not rest.partition("/")[0].strip():
        msg = f"an s3:// address must name a bucket, got {text}: write s3://BUCKET/KEY (is a variable unset?)"
        raise UserError(msg)
    if "@" in rest.partition("/")[0]:
        # The address itself is not repeated: it holds a secret.
        msg = "an s3:// address must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise UserError(msg)
    return _s3(), rest


def _path_of_file_address(rest: str) -> str:
    """What stands behind file:// -> a path; %20 is a space, unless a file's very name has it."""
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return path if os.path.exists(path) else unquote(path)


def _is_s3(store: AbstractFileSystem) -> bool:
    return "s3" in store.protocol


@contextmanager
def _explained(verb: str, uri: Address, store: AbstractFileSystem) -> Iterator[None]:
    """Say what was wanted and what to do. The cause is dropped: a server's text may repeat a key."""
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
    """Put a path together below `base`: a part that starts with a slash still stays below it."""
    return "/".join([os.fspath(base).rstrip("/"), *(part.strip("/") for part in parts)])


def as_arrow(uri: Address) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of an address as Arrow knows them, and the path there: for libraries that write by themselves."""
    store, path = _locate(uri)
    if _is_s3(store):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store)), path
    return pyarrow.fs.LocalFileSystem(), path


def local_path(uri: Address) -> str | None:
    """The absolute path of a local address; None if it lies on S3."""
    store, path = _locate(uri)
    return None if _is_s3(store) else path


def exists(uri: Address) -> bool:
    """Whether there is a file or folder at `uri`."""
    store, path = _locate(uri)
    with _explained("look for", uri, store):
        return store.exists(path)


def read_bytes(uri: Address, *, max_bytes: int | None = None) -> bytes:
    """The whole content of a file.

    Args:
        uri: the file.
        max_bytes: a larger one is refused before it is read; None for what the user has chosen to trust.

    Raises:
        FileNotFoundError: if it is not there; the message says what to check.
        PermissionError: if it may not be read.
        OSError: if the store fails otherwise.
        UserError: if it is larger than `max_bytes`.
    """
    store, path = _locate(uri)
    with _explained("read", uri, store):
        if max_bytes is not None:
            _check_size(uri, cast(int, store.info(path)["size"]), max_bytes)
        if _is_s3(store):
            # In one piece: s3fs does not ask again for one of several that breaks off.
            return cast(bytes, store.cat_file(path, max_concurrency=1))
        with open(path, "rb") as handle:
            # What grows meanwhile, or is a device without end, is not read to its end either.
            data = handle.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None:
            _check_size(uri, len(data), max_bytes)
        return data


def _check_size(uri: Address, size: int, most: int) -> None:
    if size > most:
        msg = f"{os.fspath(uri)} may have {most} bytes, got {size}: split or shrink it, if it is the right one"
        raise UserError(msg)


@contextmanager
def atomic_writer(uri: Address) -> Iterator[IO[bytes]]:
    """Open `uri` for writing bytes: they appear there whole when the block ends, or not at all.

    Folders are made as needed. If the block raises, what stood at `uri` before still stands.

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
        # Else its finaliser would try the upload once more.
        handle.closed = True
        raise


@contextmanager
def _local_writer(uri: Address, store: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    folder, _ = os.path.split(path)
    # Hidden and in the same folder: never listed as data, and replacing stays within one disk.
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
    """Write a whole file, so that a reader sees the old content or the new one and nothing between.

    Raises:
        PermissionError: if it may not be written.
        OSError: if the store fails otherwise.
    """
    with atomic_writer(uri) as handle:
        handle.write(data)


def read_tagged(uri: Address) -> tuple[bytes, str]:
    """The content of an S3 object, and the tag of this very version of it; raises as `read_bytes` does."""
    store, path = _locate(uri)
    bucket, _, key = path.partition("/")
    with _explained("read", uri, store):
        info = cast(Any, store).call_s3("head_object", Bucket=bucket, Key=key)
        return cast(bytes, store.cat_file(path)), info["ETag"]


def write_if_unchanged(uri: Address, data: bytes, tag: str | None) -> str | None:
    """Write an S3 object if nobody else has meanwhile: of several writers at once one succeeds.

    Args:
        uri: its s3:// address.
        data: its content.
        tag: of the version that is to be replaced; None if there must be no object yet.

    Returns:
        The new version's tag; None if the object is another one by now, or gone.

    Raises:
        OSError: if the store fails, or knows no conditional writes.
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
    """Delete a file that is there."""
    store, path = _locate(uri)
    with _explained("delete", uri, store):
        store.rm_file(path)


def list_files(uri: Address, suffixes: Sequence[str] = ()) -> list[str]:
    """The addresses of all files below a folder or S3 prefix, matching a glob, or of the one file named.

    Hidden files (a name or folder that starts with a dot) are left out, and folders that are links are
    not followed.

    Args:
        uri: a file, a folder (read with its subfolders), or a glob with `*`, `?`, `[...]` or `**`.
        suffixes: endings to keep, lower case with their dot, whatever the case of the names; () keeps all.

    Returns:
        Sorted addresses; local ones are absolute paths. [] if nothing matches.

    Raises:
        FileNotFoundError: if a file or folder that is no glob is not there.
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
