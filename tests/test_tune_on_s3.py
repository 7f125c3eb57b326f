from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from scalenet_ray.data import storage
from scalenet_ray.sample.scenes import write_sample
from tests.job_scripts import REPOSITORY
from tests.ray_fixture import RAY_ENVIRONMENT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_has_its_data_and_its_state_on_s3_and_resumes_there(tmp_path: Path, s3_bucket: str) -> None:
    sample = write_sample(tmp_path / "sample", train=4, val=1)
    S3FileSystem().put(str(sample), f"{s3_bucket}/sample", recursive=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | RAY_ENVIRONMENT
    command = [sys.executable, "-m", "tests.tune_on_s3", s3_bucket]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"tried"')]
    # The second time both trials are done: none is tried again.
    assert runs == [{"tried": 2, "complete": 2}, {"tried": 0, "complete": 2}]
    assert storage.exists(f"{s3_bucket}/run/tune/tuner.pkl")
    written = b"".join(storage.read_bytes(uri) for uri in storage.list_files(f"{s3_bucket}/run"))
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in written
