"""Reading and writing of files by address: a local path, file://, or an address of a store, see `data.stores`.

Files appear complete or not at all, on a disk as in a store.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, cast
from uuid import uuid4

import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.stores import (
    Address,
    ArrowHandler,
    address_of,
    explained,
    is_local,
    is_s3,
    locate,
    open_in_parts,
    put_object,
    put_object_if_unchanged,
    refuse_writing,
    tag_of_object,
)

_SPOOLED_BYTES = 2**24
"""A file for an object store stays in memory up to this size."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk, or a user's share of it, that is full."""

_LOST_RACES = ("PreconditionFailed", "ConditionalRequestConflict")
"""S3's error codes for a conditional write that lost against another writer."""


def join(base: Address, *parts: str) -> str:
    """Join path components below `base`; a leading slash of a part is ignored."""
    return "/".join([os.fspath(base).rstrip("/"), *(part.strip("/") for part in parts)])


def as_arrow(uri: Address) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return an address as an Arrow file system and the path in it, for libraries that do their own I/O."""
    store, path = locate(uri)
    if is_local(store):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(ArrowHandler(store)), path


def local_path(uri: Address) -> str | None:
    """Return the absolute path of a local address; None for a store's."""
    store, path = locate(uri)
    return path if is_local(store) else None


def exists(uri: Address) -> bool:
    """Return True if there is a file or folder at `uri`."""
    store, path = locate(uri)
    with explained("look for", uri, store):
        return store.exists(path)


def read_bytes(uri: Address, *, max_bytes: int | None = None) -> bytes:
    """Read a whole file.

    Raises:
        OSError: if it does not exist, may not be read, or the store fails otherwise.
        UserError: if it is larger than `max_bytes`, which is checked before it is read.
    """
    store, path = locate(uri)
    with explained("read", uri, store):
        if max_bytes is not None:
            # A web server need not say it.
            _check_size(uri, store.info(path)["size"] or 0, max_bytes)
        if not is_local(store):
            # One request: s3fs does not retry one of several concurrent ranges.
            data = cast(bytes, store.cat_file(path, **({"max_concurrency": 1} if is_s3(store) else {})))
            _check_size(uri, len(data), len(data) if max_bytes is None else max_bytes)
            return data
        with open(path, "rb") as handle:
            # The limit also holds for files that grow meanwhile, and for endless devices.
            data = handle.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None:
            _check_size(uri, len(data), max_bytes)
        return data


class RangeFile(io.RawIOBase):
    """A file of which parts are read, in a store by ranged requests; raises as `read_bytes`, also from `read`."""

    def __init__(self, uri: Address) -> None:
        self._uri = uri
        self._store, path = locate(uri)
        with explained("read", uri, self._store):
            # Closed by `close`.
            opened = open(path, "rb") if is_local(self._store) else open_in_parts(self._store, path)  # noqa: SIM115
        self._handle: IO[bytes] = opened

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; all that are left if it is negative."""
        with explained("read", self._uri, self._store):
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
        OSError: if it may not be written, or the store fails otherwise.
    """
    store, path = locate(uri)
    refuse_writing(uri, store)
    writer = _local_writer if is_local(store) else _s3_writer if is_s3(store) else _object_writer
    with writer(uri, store, path) as handle:
        yield handle


@contextmanager
def _object_writer(uri: Address, store: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as spooled:
        yield cast(IO[bytes], spooled)
        spooled.seek(0)
        with explained("write", uri, store):
            put_object(store, path, spooled)


@contextmanager
def _s3_writer(uri: Address, store: AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    with explained("write", uri, store):
        handle = cast(AbstractBufferedFile, store.open(path, "wb", autocommit=False))
    try:
        yield cast(IO[bytes], handle)
        with explained("write", uri, store):
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
    with explained("write", uri, store):
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            msg = f"cannot write {os.fspath(uri)}: a pipe, a socket or a device is there; name another file"
            raise OSError(msg)
        os.makedirs(folder, exist_ok=True)
        handle = open(scratch, "xb")  # noqa: SIM115 - closed below, before it is moved
    try:
        with handle:
            yield handle
        with explained("write", uri, store):
            os.replace(scratch, path)
    except BaseException as error:
        Path(scratch).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            # A write does not say of which file it is.
            error.filename = path
        raise


def write_bytes_atomic(uri: Address, data: bytes) -> None:
    """Write a whole file atomically: a reader sees the old content or the new one. Raises as `atomic_writer`."""
    with atomic_writer(uri) as handle:
        handle.write(data)


def read_tagged(uri: Address) -> tuple[bytes, str]:
    """Read an object of a store with the tag of its version; raises as `read_bytes` does."""
    store, path = locate(uri)
    with explained("read", uri, store):
        if is_s3(store):
            bucket, _, key = path.partition("/")
            tag = cast(Any, store).call_s3("head_object", Bucket=bucket, Key=key)["ETag"]
        else:
            tag = tag_of_object(store, path)
        return cast(bytes, store.cat_file(path)), tag


def write_if_unchanged(uri: Address, data: bytes, tag: str | None) -> str | None:
    """Write an object of a store by compare-and-swap: of several concurrent writers one succeeds.

    Args:
        uri: its address.
        data: its content.
        tag: tag of the version to replace; None if the object must not exist yet.

    Returns:
        The new version's tag; None if the object has changed or is gone.

    Raises:
        OSError: if the store fails, or does not support conditional writes.
    """
    store, path = locate(uri)
    refuse_writing(uri, store)
    with explained("write", uri, store):
        if is_s3(store):
            return _write_to_s3_if_unchanged(store, path, data, tag)
        return put_object_if_unchanged(store, path, data, tag)


def _write_to_s3_if_unchanged(store: AbstractFileSystem, path: str, data: bytes, tag: str | None) -> str | None:
    bucket, _, key = path.partition("/")
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
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
    store, path = locate(uri)
    refuse_writing(uri, store)
    with explained("delete", uri, store):
        store.rm_file(path)


def list_files(uri: Address, suffixes: Sequence[str] = ()) -> list[str]:
    """List the files below a folder or a store's prefix, matching a glob, or the single file named.

    Hidden files and folders (names that start with a dot) are skipped, and links to folders are not followed.

    Args:
        uri: a file, a folder (listed with its subfolders), or a glob with `*`, `?`, `[...]` or `**`.
        suffixes: lower-case endings to keep, with their dot, compared without regard to case; () keeps all.

    Returns:
        Sorted addresses; local ones are absolute paths. [] if nothing matches.

    Raises:
        FileNotFoundError: if `uri` is not a glob and does not exist.
    """
    store, path = locate(uri)
    with explained("list", uri, store):
        base = path.rstrip("/")
        if any(mark in path for mark in "*?[") and not store.exists(path):
            found = cast(dict[str, dict], store.glob(path, detail=True))
            names = [name for name, info in found.items() if info["type"] != "directory"]
            base = base[: min(base.find(mark) % (len(base) + 1) for mark in "*?[")].rpartition("/")[0]
        else:
            names = _local_files(path) if is_local(store) else cast(list[str], store.find(path))
            if not names and not store.exists(path):
                raise FileNotFoundError(path)
    kept = [name for name in names if _is_listed(name, base, tuple(suffixes))]
    return sorted(address_of(uri, store, name) for name in kept)


def _local_files(path: str) -> list[str]:
    """All files below a folder, or the file itself; of fsspec's own listing each would take ten times the memory."""

    def fail(error: OSError) -> NoReturn:
        """A folder that cannot be read must not be left out unsaid."""
        raise error

    if not os.path.isdir(path):
        return [path] if os.path.lexists(path) else []
    return [f"{folder}/{name}" for folder, _, files in os.walk(path, onerror=fail) for name in files]


def linked_folders(uri: Address) -> list[str]:
    """Links to folders below a local folder, which `list_files` does not follow: sorted paths. [] in a store."""
    path = local_path(uri)
    if path is None:
        return []
    found = [f"{folder}/{name}" for folder, folders, _ in os.walk(path) for name in folders]
    return sorted(name for name in found if os.path.islink(name) and _is_listed(name, path, ()))


def _is_listed(name: str, base: str, suffixes: tuple[str, ...]) -> bool:
    below = name[len(base) :] if name != base else posixpath.basename(name)
    hidden = any(part.startswith(".") for part in below.split("/"))
    return not hidden and (not suffixes or name.lower().endswith(suffixes))
