"""A run resumes after its driver and its head were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from scalenet_ray.runs.batch import PolicyRun
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.runs.local import LocalStream
from tests.faults import policy_of, random_networks
from tests.killable_run import OPEN_IMAGES, POLICY, RECORDS, SCENES, SHARD
from tests.ray_fixture import RAY_ENVIRONMENT

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def environment(folder: str, address: str | None = None) -> dict[str, str]:
    """Of a driver and its Ray: everything below one short folder, so that what is left of it can be told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    joins = {} if address is None else {"RAY_ADDRESS": address}
    # A driver gives a head that has gone a minute to come back; here it need not.
    return {**kept, **RAY_ENVIRONMENT, **joins, "RAY_TMPDIR": folder, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}


def processes_of(folder: str) -> list[int]:
    """What still runs of a Ray whose files are in `folder`."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and folder.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.fixture
def folder() -> Iterator[str]:
    """For one Ray's files; what still runs of it in the end is ended."""
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="killed-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield name
        for pid in processes_of(name):
            os.kill(pid, signal.SIGKILL)


class Driver:
    """A run in a process of its own."""

    def __init__(self, run: RunFolder, logs: Path, environment: dict[str, str]) -> None:
        logs.mkdir()
        self._logs = logs
        with (logs / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.killable_run", run.uri, str(logs)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def until(self, images: int) -> None:
        """Read on until it has finished so many images."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().isdigit() and int(line) >= images:
                return
        pytest.fail(f"it ended before: {(self._logs / 'errors').read_text()[-4000:]}")

    def end(self) -> int:
        """Wait for it; its exit status."""
        assert self.process.stdout is not None
        with self.process.stdout:
            self.process.stdout.read()
        return self.process.wait(timeout=120)

    def looked_at(self) -> set[int]:
        """Images whose work it began."""
        lines = [line for path in self._logs.glob("*.log") for line in path.read_text().splitlines()]
        return {int(line.split()[0]) for line in lines}


def start_head(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """A head of its own, in a process group of its own, and its address."""
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats", "--port=0"),
        *("--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"),
        "--object-store-memory=100000000",
    ]
    with Path(folder, "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment(folder), start_new_session=True, stdout=log, stderr=log)
    address = Path(folder, "ray_current_cluster")
    give_up = time.monotonic() + 90
    while not address.exists():
        assert head.poll() is None, Path(folder, "head.log").read_text()
        assert time.monotonic() < give_up
        time.sleep(0.2)
    return head, address.read_text().strip()


def tables(run: RunFolder) -> list[pa.Table]:
    # When an image was finished is no part of what was found.
    return [run.table("images", POLICY.name).drop_columns(["finished_at"]), run.table("detections", POLICY.name)]


def test_a_run_whose_driver_and_then_whose_head_was_killed_ends_as_an_uninterrupted_one(
    folder: str, tmp_path: Path
) -> None:
    run = RunFolder(str(tmp_path / "run"))

    def written() -> set[int]:
        return set(run.finished(POLICY.name).ids.tolist())

    killed = Driver(run, tmp_path / "killed", environment(folder))
    killed.until(14)
    killed.process.kill()
    assert killed.end() == -signal.SIGKILL
    first = written()
    assert SHARD <= len(first) < len(RECORDS)

    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp", ignore_cleanup_errors=True) as of_head:
        head, address = start_head(of_head)
        headless = Driver(run, tmp_path / "headless", environment(of_head, address))
        headless.until(14)
        for pid in processes_of(of_head):
            if pid != headless.process.pid:
                os.kill(pid, signal.SIGKILL)
        head.wait(20)
        assert headless.end() != 0
    second = written()
    assert first < second < {record.image_id for record in RECORDS}

    last = Driver(run, tmp_path / "last", environment(folder))
    assert last.end() == 0
    assert written() == {record.image_id for record in RECORDS}

    # What was written is not begun again; what was begun and not written is done twice, and that is bounded.
    assert not first & headless.looked_at()
    assert not second & last.looked_at()
    twice = (killed.looked_at() - first, headless.looked_at() - second)
    # In work, waiting for the detector or on their way from it, and waiting for their shard.
    most = OPEN_IMAGES + 4 * SHARD
    assert [len(images) <= most for images in twice] == [True, True], [len(images) for images in twice]

    whole = RunFolder(str(tmp_path / "whole"))
    networks = random_networks(policy_of(POLICY.name))
    PolicyRun(
        RECORDS, POLICY.name, lambda left: LocalStream(left, POLICY, networks, SCENES), whole, lambda _: None
    ).finish()
    assert tables(run) == tables(whole)
