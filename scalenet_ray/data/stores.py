"""Stores of files, by the scheme of an address: a local disk, S3, Google Cloud Storage, Azure, and others to read only.

s3://BUCKET/KEY         with s3fs
gs://BUCKET/KEY         with obstore (extra gcs)
az://CONTAINER/KEY      with obstore (extra azure)
hf://REPOSITORY/PATH    with huggingface_hub (extra hf), read only
https://HOST/PATH       read only, and so is every other scheme that fsspec knows
embedded://sample       the embedded sample, which each machine that reads it writes for itself, read only

A store is configured by the environment alone, and no message contains credentials. S3 is as botocore reads it
(`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_REGION`, `AWS_ENDPOINT_URL` ...), `AWS_NO_SIGN_REQUEST=YES` is for public
buckets. Google's are `GOOGLE_APPLICATION_CREDENTIALS` or the machine's account, Azure's `AZURE_STORAGE_ACCOUNT_NAME`
and `AZURE_STORAGE_ACCOUNT_KEY` or the machine's identity, Hugging Face's `HF_TOKEN`.

Requests that fail for a transient reason (500, 503 SlowDown, a timeout, a lost connection) are retried a bounded number
of times with increasing waits (for S3 `AWS_MAX_ATTEMPTS` and `AWS_RETRY_MODE` are botocore's).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, cast
from urllib.parse import unquote

import fsspec
import pyarrow.fs
from fsspec import AbstractFileSystem

from scalenet_ray.core.errors import UserError, needs_extra

Address = str | os.PathLike[str]

_S3_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}
_S3_ATTEMPTS = 4
_S3_READ_ATTEMPTS = 3

_OBJECT_SCHEMES = {"gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""Scheme of an address -> obstore's."""

_HUB = "(?:models|datasets|spaces|kernels|buckets)/"
_FORMS = {
    **dict.fromkeys(("s3", "gs", "gcs"), ("BUCKET/KEY", "[^/]+.*")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("CONTAINER/KEY", "[^/]+.*")),
    **dict.fromkeys(("http", "https"), ("HOST/PATH", "[^/]+.*")),
    "hf": ("datasets/OWNER/NAME/PATH", rf"(?:{_HUB})?(?!{_HUB})[\w.-]+/[\w.-]+(?:@[^/]+)?(?:/.*)?"),
    "file": ("/PATH", ".+"),
}
"""Scheme of an address -> what must follow ://, in words and as a pattern."""

_EXTRAS = {"gs": "gcs", "az": "azure"}
_OBJECT_TIMEOUTS = {"connect_timeout": "10s", "timeout": "60s"}
_OBJECT_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(minutes=2)}

_READ_AHEAD_BYTES = 2**18
"""Bytes that a ranged request to a store fetches beyond those asked for: a TIFF's tiles lie one after the other."""

_WRITTEN = "a local disk, s3://, gs:// or az://"

# By name: imports go down only.
fsspec.register_implementation("embedded", "scalenet_ray.sample.scenes.SampleFiles")


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


def _other_store(scheme: str) -> AbstractFileSystem:
    """Return the file system of another scheme, to read only."""
    if scheme not in fsspec.available_protocols():
        msg = (
            f"an address must be a path, or start with file://, s3://, gs://, az://, hf:// or https://, got {scheme}://"
        )
        raise UserError(f"{msg}: copy the files to one of these")
    try:
        with needs_extra():
            if scheme == "hf":
                import huggingface_hub  # noqa: F401 - fsspec's own error names no extra
            return fsspec.filesystem(scheme, use_listings_cache=False)
    except (ImportError, TypeError, ValueError) as error:
        msg = f"{scheme}:// cannot be opened ({error}): copy the files to {_WRITTEN}"
        raise UserError(msg) from error


def locate(uri: Address) -> tuple[AbstractFileSystem, str]:
    """Split an address into its file system and the path in it; local paths become absolute.

    Raises:
        UserError: if it is not an address, or its store cannot be opened.
    """
    text = os.fspath(uri)
    _check_form(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        # Not fsspec's own parsing: it takes "::" in a file name for a chain of file systems.
        path = _path_of_file_address(rest) if separator else os.path.expanduser(text)
        return fsspec.filesystem("file"), os.path.abspath(path)
    if scheme == "s3":
        return _s3(), rest
    if scheme in _OBJECT_SCHEMES:
        kind = _OBJECT_SCHEMES[scheme]
        with needs_extra(_EXTRAS[kind]):
            from obstore.fsspec import FsspecStore
        return cast(Any, FsspecStore)(kind, client_options=_OBJECT_TIMEOUTS, retry_config=_OBJECT_RETRIES), rest
    store = _other_store(scheme)
    return store, cast(str, store._strip_protocol(text))


def _check_form(text: str) -> None:
    """Refuse an address that is empty, holds credentials, or names no bucket, host, repository or path."""
    if not text.strip():
        msg = f"an address must be a path, file:// or a store's, as s3://, got {text!r}: name a file or folder"
        raise UserError(msg)
    # gs:/a, without //, is what is left of gs:// when a path is joined to it.
    has_slashes = "://" in text
    scheme, colon, rest = text.partition("://" if has_slashes else ":")
    if not has_slashes and not (colon and scheme in _FORMS):
        return
    if scheme != "file" and "@" in rest.lstrip("/").partition("/")[0]:
        # The message must not contain the address: it holds a secret.
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if scheme == "s3" else "them in the environment"
        msg = f"an {scheme}:// address must not hold credentials: set {keys} instead"
        raise UserError(msg)
    form, pattern = _FORMS.get(scheme, ("", ".*"))
    if not (has_slashes and re.fullmatch(pattern, rest.strip(), re.DOTALL)):
        msg = f"an address with {scheme}: must be {scheme}://{form}, got {text}: complete it (is a variable unset?)"
        raise UserError(msg)


def _path_of_file_address(rest: str) -> str:
    """Convert the part of an address after file:// to a path; %20 is a space, unless a file has that name."""
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return path if os.path.exists(path) else unquote(path)


def is_local(store: AbstractFileSystem) -> bool:
    """True for the local disk."""
    return "file" in store.protocol


def is_s3(store: AbstractFileSystem) -> bool:
    """True for S3."""
    return type(store).__module__.startswith("s3fs")


def is_object_store(store: AbstractFileSystem) -> bool:
    """True for Google Cloud Storage and Azure."""
    return type(store).__module__.startswith("obstore")


def refuse_writing(uri: Address, store: AbstractFileSystem) -> None:
    """Refuse a store that is read only: raises `UserError`."""
    if not (is_local(store) or is_s3(store) or is_object_store(store)):
        what = "it is read only, without conditional writes for the lock of a run"
        msg = f"cannot write {os.fspath(uri)}: {what}; write to {_WRITTEN}"
        raise UserError(msg)


def address_of(uri: Address, store: AbstractFileSystem, name: str) -> str:
    """Address of a file that was listed in `uri`; of a local one its path."""
    scheme = os.fspath(uri).partition("://")[0]
    return name if is_local(store) or "://" in name else f"{scheme}://{name}"


def open_in_parts(store: AbstractFileSystem, path: str) -> IO[bytes]:
    """Open a file of a store, to be read by ranged requests; of a web server without them it is fetched whole."""
    if is_object_store(store):
        return cast(IO[bytes], store.open(path, "rb"))
    if "http" in store.protocol:
        # A server without ranged requests answers with the whole file.
        answer = cast(bytes, store.cat_file(path, start=0, end=1))
        if len(answer) != 1:
            return io.BytesIO(answer)
    return cast(IO[bytes], store.open(path, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead"))


@contextmanager
def explained(verb: str, uri: Address, store: AbstractFileSystem) -> Iterator[None]:
    """Reraise errors with a message that says what to do, without their cause: a server's text may contain a key."""
    address = os.fspath(uri)
    try:
        yield
    except FileNotFoundError:
        place = "the bucket and key, and AWS_ENDPOINT_URL" if is_s3(store) else "the path"
        kind, reason = FileNotFoundError, f"there is no such file or folder; check {place}"
    except IsADirectoryError:
        kind, reason = IsADirectoryError, "it is a folder; name a file in it"
    except NotADirectoryError:
        kind, reason = NotADirectoryError, "a part of the path is a file, not a folder; check the path"
    except FileExistsError as error:
        kind, reason = FileExistsError, f"{error.filename or 'a part of the path'} is a file; name a folder"
    except PermissionError:
        remedy = "its owner and mode" if is_local(store) else "the credentials in the environment"
        kind, reason = PermissionError, f"access is denied; check {remedy}"
    except Exception as error:
        if is_local(store) or isinstance(error, UserError):
            raise
        kind, reason = OSError, _s3_reason(error) if is_s3(store) else _reason(error)
        if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            kind, reason = PermissionError, "access is denied; check the credentials in the environment"
    else:
        return
    raise kind(f"cannot {verb} {address}: {reason}") from None


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


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    answer = f" {status}" if isinstance(status, int) else ""
    return (
        f"the store failed with {type(error).__name__}{answer}; check the address, the network and the credentials in "
        "the environment"
    )


# --- Google Cloud Storage and Azure -------------------------------------------------------------------


def _bucket_and_key(store: AbstractFileSystem, path: str) -> tuple[Any, str]:
    bucket, _, key = path.partition("/")
    return cast(Any, store)._construct_store(bucket), key


def put_object(store: AbstractFileSystem, path: str, file: IO[bytes]) -> None:
    """Write an object from a file; it appears whole."""
    import obstore

    obstore.put(*_bucket_and_key(store, path), cast(Any, file))


def put_object_if_unchanged(store: AbstractFileSystem, path: str, data: bytes, tag: str | None) -> str | None:
    """Write an object by compare-and-swap, see `storage.write_if_unchanged`."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    mode: Any = "create" if tag is None else _version_of(tag)
    try:
        return _tag(obstore.put(*_bucket_and_key(store, path), data, mode=mode))
    except (AlreadyExistsError, PreconditionError):
        return None
    except FileNotFoundError:
        if tag is None:
            raise
        return None


def tag_of_object(store: AbstractFileSystem, path: str) -> str:
    """The tag of an object's version."""
    import obstore

    return _tag(obstore.head(*_bucket_and_key(store, path)))


def _tag(result: Any) -> str:
    """Tag of a version: Azure's condition is its entity tag, Google's its generation."""
    return f"{result['e_tag'] or ''} {result['version'] or ''}"


def _version_of(tag: str) -> dict[str, str]:
    e_tag, _, version = tag.rpartition(" ")
    return {name: value for name, value in (("e_tag", e_tag), ("version", version)) if value}


class _Bytes:
    """A file to write to, that passes Arrow's buffers on as bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Write a buffer."""
        return self._file.write(bytes(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class ArrowHandler(pyarrow.fs.FSSpecHandler):
    """Arrow's view of a store."""

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Open a file for writing."""
        del metadata
        import pyarrow as pa

        return pa.PythonFile(_Bytes(self.fs.open(path, mode="wb")), mode="w")
