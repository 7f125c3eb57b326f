"""Lock of a run folder: one driver at a time, and a dead driver's lock can be taken over.

A local folder is locked by the kernel (`flock`), which releases the lock when the process ends. In a store the lock is
an object, `driver.lock`, created on the condition that it does not exist and renewed every few seconds by a thread. To
take it over, another driver watches it: the lock is stale if it does not change for `_STALE_SECONDS`. Clocks of
different machines are not compared. A driver that was paused and finds that its lock was taken over stops before its
next write.

The lock is renewed by a thread and not at each write of results, because a living driver may write nothing for an
hour: an epoch of a training, the evaluation at the end of a run, the start of a cluster. A stale time above that would
make every resume after a crash wait as long.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

from scalenet_ray.data import storage

LOCK = "driver.lock"
"""The file or object that is locked."""

_HEARTBEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0


@contextmanager
def lock_run(uri: str, *, take_over: bool) -> Iterator[Callable[[], None]]:
    """Lock a run folder for this driver while the block runs.

    Args:
        uri: the run folder, local or in a store.
        take_over: in a store, watch an existing lock and take it over if it is stale; without it an existing lock is
            refused at once. The local lock of a dead driver is free in any case.

    Yields:
        A function that raises `RuntimeError` if another driver has taken over.

    Raises:
        FileExistsError: if another driver is at work there; it names the driver.
        OSError: if the file system does not support locks.
        UserError: if the store is read only.
    """
    path = storage.local_path(storage.join(uri, LOCK))
    if path is None:
        lock = _StoreLock(uri, take_over=take_over)
        try:
            yield lock.check
        finally:
            lock.release()
        return
    handle = _lock_file(uri, path)
    try:
        # The kernel keeps the lock while the process lives.
        yield lambda: None
    finally:
        os.unlink(path)
        os.close(handle)


def _content(driver: str, beat: int) -> bytes:
    return json.dumps({"driver": driver, "pid": os.getpid(), "host": platform.node(), "beat": beat}).encode()


def _refused(uri: str, content: bytes, remedy: str) -> FileExistsError:
    try:
        holder = json.loads(content)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another driver"
    return FileExistsError(f"{who} is at work in {uri}, and two would spoil each other's results: {remedy}")


def _lock_file(uri: str, path: str) -> int:
    """Create the lock file of a local run folder, locked by the kernel (`flock`); returns its descriptor."""
    while True:
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
        # The last holder may have deleted the file between its opening and its locking here.
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            try:
                os.truncate(handle, 0)
                os.write(handle, _content(uuid4().hex, 0))
            except OSError as error:
                os.unlink(path)
                os.close(handle)
                error.filename = path
                raise
            return handle
        os.close(handle)


class _StoreLock:
    """An object of a store that a thread renews while the driver lives."""

    def __init__(self, uri: str, *, take_over: bool) -> None:
        self._uri = uri
        self._object = storage.join(uri, LOCK)
        self._driver = uuid4().hex
        self._beat = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._tag = self._claim(take_over=take_over)
        self._renewed = time.monotonic()
        threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True).start()

    def _claim(self, *, take_over: bool) -> str:
        tag = None
        while True:
            written = storage.write_if_unchanged(self._object, _content(self._driver, 0), tag)
            if written is not None:
                return written
            tag = self._watch(take_over=take_over)

    def _watch(self, *, take_over: bool) -> str | None:
        """Wait until the existing lock is stale, and return its tag; None if it was deleted."""
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
            time.sleep(_HEARTBEAT_SECONDS / 2)

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            try:
                self._renew()
            except OSError:
                # The store does not answer: `check` renews the lock before the next write.
                continue
            except RuntimeError:
                return

    def _renew(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._beat += 1
            tag = storage.write_if_unchanged(self._object, _content(self._driver, self._beat), self._tag)
            self._tag = tag if tag is not None else self._tag_if_ours()
            self._renewed = time.monotonic()

    def _tag_if_ours(self) -> str:
        """The tag of the lock if this driver wrote it, e.g. in a request whose response was lost."""
        try:
            content, tag = storage.read_tagged(self._object)
        except FileNotFoundError:
            content, tag = b"{}", ""
        if json.loads(content).get("driver") != self._driver:
            msg = f"another driver has taken over {self._uri}, as this one showed no sign of life: it goes on there"
            raise RuntimeError(msg)
        return tag

    def check(self) -> None:
        """Raise `RuntimeError` if another driver has taken over while this one was paused or disconnected."""
        if time.monotonic() - self._renewed > _STALE_SECONDS / 2:
            self._renew()

    def release(self) -> None:
        """Delete the object, if it is still this driver's."""
        with self._lock:
            self._ended.set()
            try:
                self._tag_if_ours()
                storage.delete(self._object)
            except (OSError, RuntimeError):
                # Taken over, or the store does not answer: the lock becomes stale by itself.
                pass
