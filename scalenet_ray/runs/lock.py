"""One driver to a run folder: a lock that a dead driver does not hold for ever.

A local folder is locked by the kernel (`flock`), which lets go when the process ends, however it ends. On S3 the
lock is an object, `driver.lock`, written on the condition that there is none, and written again every few seconds
while the driver lives: its beat. Whoever wants to take over watches it: a lock whose object does not change for
`_STALE_SECONDS` is a dead driver's. No two clocks are compared. A driver that was only paused, and finds another's
lock in the place of its own, stops before it writes anything more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
from types import TracebackType
from typing import Protocol
from uuid import uuid4

from scalenet_ray.data import storage

__all__ = [
    "RunLock",
    "lock_run",
]

_NAME = "driver.lock"


_BEAT_SECONDS = 5.0


_STALE_SECONDS = 30.0


class RunLock(Protocol):
    """A lock that is held. As a context manager it is released at the end, also when the block raises."""

    def check(self) -> None:
        """Raise `RuntimeError` if another driver has taken over."""
        ...

    def release(self) -> None:
        """Let go."""
        ...

    def __enter__(self) -> RunLock: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def lock_run(uri: str, *, take_over: bool) -> RunLock:
    """Lock a run folder for this driver.

    Args:
        uri: the run folder, local or s3://.
        take_over: on S3, watch a lock that is there and take it over if its driver is dead; else it is refused at
            once. A local lock of a dead driver needs no taking over.

    Raises:
        FileExistsError: if another driver is at work there; it names the driver.
        OSError: if the file system knows no locks.
    """
    path = storage.local_path(storage.join(uri, _NAME))
    return _LocalLock(uri, path) if path is not None else _S3Lock(uri, take_over=take_over)


def _driver(uuid: str, beat: int) -> bytes:
    return json.dumps({"driver": uuid, "pid": os.getpid(), "host": platform.node(), "beat": beat}).encode()


def _refused(uri: str, content: bytes, remedy: str) -> FileExistsError:
    try:
        holder = json.loads(content)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another driver"
    return FileExistsError(f"{who} is at work in {uri}, and two would spoil each other's results: {remedy}")


class _Held:
    """What both kinds share."""

    def release(self) -> None:
        """Let go."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        self.release()


class _LocalLock(_Held):
    """The kernel's lock on a file in the folder.

    Args:
        uri: the run folder.
        path: the file.
    """

    def __init__(self, uri: str, path: str) -> None:
        self._path = path
        self._handle: int | None = None
        while self._handle is None:
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except PermissionError:
                msg = f"cannot write {uri}: access is denied; check its owner and mode"
                raise PermissionError(msg) from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                content = os.read(handle, 4096)
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _refused(uri, content, "wait until it ends, or stop it, then add --resume") from None
                msg = f"cannot lock {path}: {os.strerror(error.errno or 0)}; give an --output whose disk has file locks"
                raise OSError(msg) from None
            if self._is_still_there(handle):
                self._handle = handle
            else:
                os.close(handle)
        os.truncate(self._handle, 0)
        os.write(self._handle, _driver(uuid4().hex, 0))

    def _is_still_there(self, handle: int) -> bool:
        """Whether its last holder has not deleted the file between our opening it and our locking it."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> _LocalLock:
        return self

    def check(self) -> None:
        """Nobody can take over from a process that lives."""

    def release(self) -> None:
        """Delete the file and let go."""
        if self._handle is not None:
            os.unlink(self._path)
            os.close(self._handle)
            self._handle = None


class _S3Lock(_Held):
    """An object that is written again while its driver lives.

    Args:
        uri: the run folder.
        take_over: whether to watch a lock that is there, and take it over.
    """

    def __init__(self, uri: str, *, take_over: bool) -> None:
        self._uri = uri
        self._object = storage.join(uri, _NAME)
        self._driver = uuid4().hex
        self._beat = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._tag = self._claim(take_over=take_over)
        self._beaten = time.monotonic()
        threading.Thread(target=self._keep_beating, name="run-lock", daemon=True).start()

    def _claim(self, *, take_over: bool) -> str:
        tag = None
        while True:
            written = storage.write_if_unchanged(self._object, _driver(self._driver, 0), tag)
            if written is not None:
                return written
            tag = self._watch(take_over=take_over)

    def _watch(self, *, take_over: bool) -> str | None:
        """The tag of the lock that is there, once it is known to be a dead driver's; None if it has gone."""
        give_up = time.monotonic() + _STALE_SECONDS
        first: str | None = None
        while True:
            try:
                content, tag = storage.read_tagged(self._object)
            except FileNotFoundError:
                return None
            first = first or tag
            if tag != first:
                raise _refused(self._uri, content, "wait until it ends, or stop it, then add --resume")
            if not take_over:
                remedy = f"if it died, --resume takes over after {_STALE_SECONDS:.0f} s without a sign of life"
                raise _refused(self._uri, content, remedy)
            if time.monotonic() > give_up:
                return tag
            time.sleep(_BEAT_SECONDS / 2)

    def __enter__(self) -> _S3Lock:
        return self

    def _keep_beating(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                self._write_again()
            except OSError:
                # The store does not answer: `check` finds out before anything is written.
                continue
            except RuntimeError:
                return

    def _write_again(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._beat += 1
            tag = storage.write_if_unchanged(self._object, _driver(self._driver, self._beat), self._tag)
            self._tag = tag if tag is not None else self._tag_if_ours()
            self._beaten = time.monotonic()

    def _tag_if_ours(self) -> str:
        """The tag of the lock, which may have been written by a try of ours whose answer was lost."""
        try:
            content, tag = storage.read_tagged(self._object)
        except FileNotFoundError:
            content, tag = b"{}", ""
        if json.loads(content).get("driver") != self._driver:
            msg = f"another driver has taken over {self._uri}, as this one showed no sign of life: it goes on there"
            raise RuntimeError(msg)
        return tag

    def check(self) -> None:
        """Raise `RuntimeError` if another driver has taken over while this one was paused or cut off."""
        if time.monotonic() - self._beaten > _STALE_SECONDS / 2:
            self._write_again()

    def release(self) -> None:
        """Delete the object, if it is still ours."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            try:
                self._tag_if_ours()
                storage.delete(self._object)
            except (OSError, RuntimeError):
                # Another's by now, or out of reach: it goes stale by itself.
                return
