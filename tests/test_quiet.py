"""A run on Ray shows its own lines on the terminal, and nothing of Ray's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dying_detector import DIED
from tests.job_scripts import REPOSITORY
from tests.stalling_detector import write_grey_images

IMAGES = 24


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_whose_actor_dies_and_is_replaced_shows_progress_and_no_line_of_ray(tmp_path: Path) -> None:
    write_grey_images(tmp_path / "images", IMAGES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "scalenet_ray", "detect", "--images", str(tmp_path / "images")),
            *("--detector", "tests.dying_detector:Dying", "--policy", "grid-2", "--output", str(tmp_path / "run")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", DIED: str(tmp_path / "died")},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    assert (tmp_path / "died").exists()
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "checking the images and the networks"
    assert lines[1].startswith("Ray's dashboard: http://")
    assert "1 pipeline" in lines[2]
    assert lines[3].startswith(f"results go to {tmp_path / 'run'}")
    assert lines[4] == f"grid-2: 0/{IMAGES} images, starting"
    assert f"grid-2: {IMAGES}/{IMAGES} images" in done.stdout
    assert lines[-1].startswith(f"{IMAGES} of {IMAGES} images done")
