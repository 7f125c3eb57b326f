"""SIGINT and SIGTERM: finished images are written, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scalenet_ray.console import run_job
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.runs.folder import RunFolder
from tests.job_scripts import REPOSITORY, load_job
from tests.ray_fixture import RAY_ENVIRONMENT
from tests.stalling_detector import STALLED, write_grey_images

IMAGES, STALLED_AT = 12, 7
TWO_PIPELINES = ("--pipelines", "2", "--readers", "2", "--scale-actors", "2", "--detector-actors", "2")


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
        # Signals to its group reach the processes that it started, as Ctrl-C in a terminal does, and not the tests.
        start_new_session=True,
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


def test_a_stopped_run_keeps_what_is_finished_and_resumed_equals_an_uninterrupted_one(folder: Path) -> None:
    process = detect(folder)
    wait_for(folder / "stalled", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
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


def test_a_second_signal_ends_the_process_at_once(folder: Path) -> None:
    process = detect(folder, STUBBORN="1")
    wait_for(folder / "stalled", process)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        # The first one is on its way for as long as the interpreter takes to notice it.
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT
    assert process.communicate()[1] == ""


def test_a_run_that_is_stopped_while_it_is_concluded_has_all_its_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = load_job("detect")
    monkeypatch.setenv(STALLED, str(folder))
    monkeypatch.setenv("STALLED_AT", "0")
    monkeypatch.setattr(
        "scalenet_ray.workflows.detection.write_summary", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM)
    )
    asked = job.DetectImages(
        images=str(folder / "images"),
        policy="whole",
        output=str(folder / "run"),
        engine="local",
        networks=NetworkSpec(detector="tests.stalling_detector:Stalling"),
    )
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as exit_of:
            run_job(job.main, asked)
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert exit_of.value.code == 143
    said = capsys.readouterr().err
    assert said == f"stopped: whole: 12 of 12 done; go on with --resume --output {folder / 'run'}\n"
    assert not (folder / "run" / "driver.lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arguments", [(), TWO_PIPELINES])
def test_on_ray_a_stopped_run_keeps_what_is_finished_and_says_one_line(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    small = ("--scale-batch-size", "1", "--detector-batch-size", "1", *arguments)
    process = detect(folder, *small, engine="ray", **RAY_ENVIRONMENT)
    wait_for(folder / "stalled", process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    run = folder / "run"
    stands = re.fullmatch(rf"stopped: whole: (\d+) of 12 done; go on with --resume --output {run}\n", said)
    assert stands, said
    assert len(RunFolder(str(run)).finished("whole")) == int(stands[1])

    resumed = detect(folder, "--resume")
    assert (*resumed.communicate(), resumed.returncode)[1:] == ("", 0)
    assert len(json.loads((run / "results.json").read_text())) == IMAGES
