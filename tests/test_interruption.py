"""Signals to real processes: what is finished is written, and a resumed run ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.job_scripts import REPOSITORY
from tests.stalling_detector import STALLED, write_grey_images

IMAGES, STALLED_AT = 12, 7


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        STALLED: str(folder / "stalled"),
        "STALLED_AT": str(10 * STALLED_AT),
        **more,
    }


def detect(folder: Path, *arguments: str, output: str = "run", engine: str = "local", **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, str(REPOSITORY / "jobs/detect.py"), "--images", str(folder / "images")),
            *("--detector", "tests.stalling_detector:Stalling", "--policy", "whole", "--engine", engine),
            *("--output", str(folder / output), *arguments),
        ],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that was started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_grey_images(tmp_path / "images", IMAGES)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_what_is_finished_and_resumed_equals_an_uninterrupted_one(
    folder: Path, number: signal.Signals
) -> None:
    process = detect(folder)
    wait_for(folder / "stalled", process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    run = folder / "run"
    assert said == f"stopped: whole: 6 of 12 done; go on with --resume --output {run}\n"
    assert not (run / "driver.lock").exists()
    assert not (run / "error.txt").exists()

    resumed = detect(folder, "--resume")
    assert (*resumed.communicate(), resumed.returncode)[1:] == ("", 0)
    whole = detect(folder, output="whole")
    assert (*whole.communicate(), whole.returncode)[1:] == ("", 0)
    found = [json.loads((folder / name / "results.json").read_text()) for name in ("run", "whole")]
    assert len(found[0]) == IMAGES
    assert found[0] == found[1]
