from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalenet_ray.core.samples import write_sample
from scalenet_ray.models.networks import SAMPLE_DETECTOR, SAMPLE_SCALE_NET
from tests.job_scripts import REPOSITORY, same_results

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """As of a shell with the environment's bin first: the entrypoint's `python` comes from there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A running `ray start --head` of its own, ended by its process group: `ray stop` would end every Ray here."""
    port = free_port()
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"),
            *(f"--port={free_port()}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}"),
        ]
        head = subprocess.Popen(
            command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while not answers(address):
                assert head.poll() is None, "ray start --head ended"
                time.sleep(0.5)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()


@pytest.mark.ray
def test_a_submitted_job_does_the_same_as_the_plain_command(tmp_path: Path, dashboard: str) -> None:
    data = write_sample(tmp_path / "sample", train=1, val=6)
    job = [
        *("jobs/eval_coco.py", "--data", str(data), "--policies", "scalenet"),
        *("--detector", SAMPLE_DETECTOR, "--scale-net", SAMPLE_SCALE_NET),
    ]
    submit = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "python"]
    submitted = subprocess.run(
        [*submit, *job, "--output", str(tmp_path / "submitted")],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "6 of 6 images done" in submitted.stdout

    plain = [sys.executable, *job, "--engine", "local", "--output", str(tmp_path / "plain")]
    subprocess.run(plain, cwd=REPOSITORY, env=environment(), check=True, capture_output=True)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("submitted", "plain")]
    assert results[0]
    assert same_results(*results)
