"""The lock of a run folder, on disk and on S3."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecords
from scalenet_ray.runs.batch import ShardWriter
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.lock import _StoreLock, lock_run
from tests.test_folder import result_of

SETTINGS = {"seed": 1}
LIVES = """
import sys, time
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.batch import ShardWriter
with RunFolder(sys.argv[1]).begin({"seed": 1}, resume=False):
    sys.stdout.write("begun\\n")
    sys.stdout.flush()
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat four times a second; a second without one is stale."""
    monkeypatch.setattr("scalenet_ray.runs.lock._HEARTBEAT_SECONDS", 0.25)
    monkeypatch.setattr("scalenet_ray.runs.lock._STALE_SECONDS", 1.0)


@pytest.fixture(params=["local", "s3", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder on disk, in S3, and in a store that obstore reaches."""
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('s3_bucket' if request.param == 's3' else 'object_bucket')}/run"


def lock_of(uri: str) -> str:
    return storage.join(uri, "driver.lock")


def dead_lock(uri: str) -> None:
    """What a driver that was killed leaves behind on S3."""
    storage.write_bytes_atomic(lock_of(uri), b'{"driver": "0", "pid": 7, "host": "lost", "beat": 3}')


def wait_until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_driver_is_refused_and_told_who_is_at_work(uri: str, resume: bool) -> None:
    with RunFolder(uri).begin(SETTINGS, resume=False):
        message = rf"process \d+ on \S+ is at work in {uri}.*--resume"
        with pytest.raises(FileExistsError, match=message), RunFolder(uri).begin(SETTINGS, resume=resume):
            pass
        assert storage.exists(lock_of(uri))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_or_fails_lets_go(uri: str, error: type[BaseException] | None) -> None:
    def work() -> None:
        with RunFolder(uri).begin(SETTINGS, resume=False):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert not storage.exists(lock_of(uri))
    with RunFolder(uri).begin(SETTINGS, resume=True):
        pass


def test_a_run_that_may_not_begin_lets_go(uri: str) -> None:
    with RunFolder(uri).begin(SETTINGS, resume=False):
        pass
    with pytest.raises(FileExistsError, match="holds a run already"), RunFolder(uri).begin(SETTINGS, resume=False):
        pass
    with pytest.raises(ValueError, match="begun with other settings"), RunFolder(uri).begin({"seed": 2}, resume=True):
        pass
    assert not storage.exists(lock_of(uri))


def test_a_killed_drivers_local_lock_is_free_at_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "run")
    driver = subprocess.Popen([sys.executable, "-c", LIVES, uri], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "begun\n"
    with pytest.raises(FileExistsError, match=f"process {driver.pid} on"), RunFolder(uri).begin(SETTINGS, resume=True):
        pass
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    assert storage.exists(lock_of(uri))
    with RunFolder(uri).begin(SETTINGS, resume=True):
        pass
    assert not storage.exists(lock_of(uri))


def test_a_folder_that_may_not_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("scalenet_ray.runs.lock.os.makedirs", denied)
    denied_words = "access is denied; check its owner and mode"
    with pytest.raises(PermissionError, match=denied_words), lock_run(str(tmp_path / "run"), take_over=False):
        pass


# --- on S3 --------------------------------------------------------------------------------------------------


def test_a_lock_that_does_not_fit_the_disk_is_named_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    wanted = r"No space left on device: '.*/run/driver\.lock'"
    with pytest.raises(OSError, match=wanted), lock_run(str(tmp_path / "run"), take_over=False):
        pass
    assert not any((tmp_path / "run").iterdir())


def test_a_dead_drivers_lock_on_s3_is_taken_over_by_resume_alone(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/run"
    dead_lock(uri)
    message = r"process 7 on lost is at work .*--resume takes over after 1 s"
    with pytest.raises(FileExistsError, match=message), lock_run(uri, take_over=False):
        pass
    begun = time.monotonic()
    with lock_run(uri, take_over=True):
        # Not before it was watched for as long as a lock takes to go stale.
        assert time.monotonic() - begun > 1.0
        assert json.loads(storage.read_bytes(lock_of(uri)))["host"] != "lost"


def test_of_two_that_take_over_one_succeeds(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/run"
    dead_lock(uri)
    _, tag = storage.read_tagged(lock_of(uri))
    assert storage.write_if_unchanged(lock_of(uri), b"first", tag) is not None
    assert storage.write_if_unchanged(lock_of(uri), b"second", tag) is None
    assert storage.write_if_unchanged(lock_of(uri), b"third", None) is None
    storage.delete(lock_of(uri))
    assert storage.write_if_unchanged(lock_of(uri), b"fourth", tag) is None


def test_a_driver_that_was_paused_writes_nothing_once_another_has_taken_over(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_bucket}/run"
    with monkeypatch.context() as paused:
        paused.setattr(_StoreLock, "_send_heartbeats", lambda self: None)
        run = RunFolder(uri)
        first = run.begin(SETTINGS, resume=False)
        first.__enter__()
    with RunFolder(uri).begin(SETTINGS, resume=True):
        writer = ShardWriter(run, "whole", ImageRecords.listed(["1.jpg"]), lambda ids: None)
        writer.add(result_of(1), 1.5)
        with pytest.raises(RuntimeError, match="another driver has taken over"):
            writer.flush()
        assert not run.finished("whole")
        first.__exit__(None, None, None)
        # It was not the first one's to delete.
        assert storage.exists(lock_of(uri))


def test_a_beat_whose_answer_was_lost_is_still_ours(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/run"
    lock = _StoreLock(uri, take_over=False)
    lock._tag = '"of before"'
    lock._renew()
    lock._renew()
    lock.check()
    lock.release()


def test_a_lock_that_beats_is_never_stale(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/run"
    with lock_run(uri, take_over=False):
        _, first = storage.read_tagged(lock_of(uri))
        wait_until(lambda: storage.read_tagged(lock_of(uri))[1] != first)
        with pytest.raises(FileExistsError, match="is at work"), lock_run(uri, take_over=True):
            pass
