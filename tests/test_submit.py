"""A job submitted to a cluster of three nodes equals the plain command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import REPOSITORY, same_results

BIN = Path(sys.executable).parent
TOKEN = "token-of-a-test-that-must-stay-hidden"


def environment(home: Path) -> dict[str, str]:
    """As of a shell that has not activated the environment: the entrypoint names its Python by an absolute path.

    Its home is its own, and the token in it: as `ray get-auth-token --generate` leaves it.
    """
    (home / ".ray").mkdir(exist_ok=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours = {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **ours}


def status_of(address: str, token: str | None) -> int:
    """What the job server answers to someone who would see its jobs; 0 while it does not answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=5
        ) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def session() -> Iterator[Path]:
    """The folder of Ray's sockets and logs: its path must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def cluster(s3_bucket: str, session: Path, tmp_path: Path) -> Iterator[str]:
    """The job server of a cluster of three nodes, whose processes have S3's credentials in their environment."""
    command = [sys.executable, "-m", "tests.three_nodes", str(session)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = next((line.strip() for line in process.stdout if line.startswith("http://")), "")
        assert address, process.communicate()[1]
        while status_of(address, TOKEN) != 200:
            assert process.poll() is None, "the cluster ended"
            time.sleep(0.5)
        yield address
    finally:
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_submitted_to_three_nodes_does_the_same_as_the_plain_command(
    tmp_path: Path, s3_bucket: str, session: Path, cluster: str
) -> None:
    sample = write_sample(tmp_path / "sample", train=1, val=6)
    store = S3FileSystem()
    store.put(str(sample), f"{s3_bucket}/sample", recursive=True)
    assert [status_of(cluster, token) for token in (None, "another", TOKEN)] == [401, 403, 200]

    job = [
        "jobs/eval_coco.py",
        "--policies",
        "scalenet",
        "--detector",
        SAMPLE_DETECTOR,
        "--scale-net",
        SAMPLE_SCALE_NET,
    ]
    submit = [str(BIN / "ray"), "job", "submit", "--address", cluster, "--working-dir", ".", "--", str(BIN / "python")]
    submitted = subprocess.run(
        [*submit, *job, "--data", f"{s3_bucket}/sample", "--output", f"{s3_bucket}/run", "--detector-actors", "2"],
        cwd=REPOSITORY,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert f"6 of 6 images done, results in {s3_bucket}/run" in submitted.stdout

    plain = [sys.executable, *job, "--engine", "local", "--data", str(sample), "--output", str(tmp_path / "plain")]
    subprocess.run(plain, cwd=REPOSITORY, env=environment(tmp_path), check=True, capture_output=True)
    there = json.loads(store.cat(f"{s3_bucket}/run/results.json"))
    assert there
    assert same_results(there, json.loads((tmp_path / "plain" / "results.json").read_text()))

    # What was said, what is in the run folder, and all that Ray's processes on three nodes logged.
    logs = [path for path in session.rglob("*") if path.is_file() and "logs" in path.parts]
    written = [store.cat(path) for path in store.find(f"{s3_bucket}/run")]
    assert logs
    assert written
    shown = [said.encode(), *written, *(path.read_bytes() for path in logs)]
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], TOKEN):
        assert [text[:200] for text in shown if secret.encode() in text] == []
