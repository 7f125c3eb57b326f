from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from s3fs import S3FileSystem

from scalenet_ray.core import storage
from scalenet_ray.core.samples import write_sample
from tests.job_scripts import REPOSITORY
from tests.ray_fixture import RAY_ENVIRONMENT

SPACE = {"version": 1, "policies": ["first-pass"], "search": {"recursion.max_windows": {"of": [1, 4]}}}


@pytest.mark.ray
def test_a_sweep_has_its_space_its_data_and_its_state_on_s3_and_resumes_there(tmp_path: Path, s3_bucket: str) -> None:
    """In processes of its own: Ray's workers have the environment in which it was started."""
    sample = write_sample(tmp_path / "sample", train=4, val=2)
    S3FileSystem().put(str(sample), f"{s3_bucket}/sample", recursive=True)
    storage.write_bytes_atomic(f"{s3_bucket}/space.yaml", yaml.safe_dump(SPACE).encode())
    output = f"{s3_bucket}/runs/tune"
    command = [sys.executable, "jobs/tune_recursion.py", "--data", f"{s3_bucket}/sample", "--searcher", "grid"]
    command += ["--space", f"{s3_bucket}/space.yaml", "--ceiling", "4", "--subsets", "1", "--output", output]
    command += ["--detector", f"tiny:{REPOSITORY}/scalenet_ray/weights/sample_detector.safetensors"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | RAY_ENVIRONMENT
    said = []
    for flags in ([], ["--resume"]):
        done = subprocess.run(
            [*command, *flags],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0].count("passes on 4 images") == 2
    # All trials are done: none is tried again.
    assert said[1].count("passes on 4 images") == 0
    assert storage.exists(f"{output}/tune/tuner.pkl")
    assert yaml.safe_load(storage.read_bytes(f"{output}/best.yaml"))[0]["name"] == "tuned"
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in b"".join(
        storage.read_bytes(uri) for uri in storage.list_files(output)
    )
