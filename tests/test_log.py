"""Console lines and TensorBoard events of a training run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from scalenet_ray.data import storage
from scalenet_ray.runs.folder import RunFolder
from scalenet_ray.training.log import TrainingLog


def _row(epoch: int, **changes: Any) -> dict[str, Any]:
    row = {
        "epoch": epoch,
        "loss": 0.5 / epoch,
        "val": {"iou": [90.0, 40.0 + epoch, math.nan], "pixel_ap_small": 30.0 + epoch},
        "images_per_second": 12.34,
        "seconds": 40.0,
        "failed": [],
    }
    return row | changes


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def _events(content: bytes) -> list[tuple[int, str, float]]:
    """The scalars of a TensorBoard file: records of a length (8 bytes), its check sum (4), data, and theirs (4)."""
    found, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 16 + size
    return found


def test_each_epoch_is_said_and_written(tmp_path: Path) -> None:
    lines: list[str] = []
    log = TrainingLog(RunFolder(str(tmp_path)), {"train_images": 8}, 3, lines.append)
    log(_row(1))
    assert lines == ["epoch 1/3: loss 0.5000, val pixel_ap_small 31, 12.3 images/s, 1 min 20 s left"]
    assert [row["epoch"] for row in _metrics(tmp_path)["epochs"]] == [1]
    log(_row(2))
    log(_row(3))
    assert lines[-1].endswith("0 s left")
    metrics = _metrics(tmp_path)
    assert metrics["train_images"] == 8
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2, 3]
    assert metrics["epochs"][1]["loss"] == 0.25
    # JSON has no NaN.
    assert metrics["epochs"][1]["val"]["iou"] == [90.0, 42.0, None]


def test_tensorboard_has_every_number_by_epoch(tmp_path: Path) -> None:
    log = TrainingLog(RunFolder(str(tmp_path)), {}, 2, lambda line: None)
    log(_row(1))
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert {step for step, _, _ in _events(path.read_bytes())} == {1}
    log(_row(2))
    paths = sorted((tmp_path / "tensorboard").iterdir())
    assert paths[0] == path
    assert all("tfevents" in path.name for path in paths)
    found = [event for path in paths for event in _events(path.read_bytes())]
    names = {"loss", "val/iou/0", "val/iou/1", "val/pixel_ap_small", "images_per_second", "seconds"}
    assert {(step, name) for step, name, _ in found} == {(step, name) for step in (1, 2) for name in names}
    assert (2, "val/iou/1", 42.0) in found


def test_a_run_that_is_taken_up_keeps_its_epochs_and_says_one_again_once(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    first = TrainingLog(run, {}, 4, lambda line: None)
    first(_row(1, failed=["image 7 is broken"]))
    first(_row(2))
    second = TrainingLog(run, {}, 4, lambda line: None)
    assert second.failed == ["image 7 is broken"]
    second(_row(2, loss=0.125))
    second(_row(3, failed=["image 3 is gone"]))
    metrics = _metrics(tmp_path)
    assert [(row["epoch"], row["loss"]) for row in metrics["epochs"]] == [(1, 0.5), (2, 0.125), (3, 0.5 / 3)]
    assert metrics["failed"] == second.failed == ["image 3 is gone", "image 7 is broken"]
    assert {path.name[-5:] for path in (tmp_path / "tensorboard").iterdir()} == {"00001", "00002", "00003"}


def test_a_figure_that_was_not_a_number_is_taken_up_too(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    TrainingLog(run, {}, 2, lambda line: None)(_row(1, val={"pixel_ap_small": math.nan}))
    lines: list[str] = []
    TrainingLog(run, {}, 2, lines.append)(_row(2))
    assert [row["val"]["pixel_ap_small"] for row in _metrics(tmp_path)["epochs"]] == [None, 32.0]
    assert len(lines) == 1


def test_without_validation_there_is_no_figure_to_say(tmp_path: Path) -> None:
    lines: list[str] = []
    TrainingLog(RunFolder(str(tmp_path)), {}, 1, lines.append)(_row(1, val={}))
    assert lines == ["epoch 1/1: loss 0.5000, 12.3 images/s, 0 s left"]


def test_on_s3_the_same_is_written(s3_bucket: str) -> None:
    run = RunFolder(f"{s3_bucket}/runs/a")
    TrainingLog(run, {}, 2, lambda line: None)(_row(1))
    second = TrainingLog(run, {}, 2, lambda line: None)
    second(_row(2))
    metrics = json.loads(storage.read_bytes(f"{run.uri}/metrics.json"))
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    found = [_events(storage.read_bytes(uri)) for uri in storage.list_files(f"{run.uri}/tensorboard", ())]
    assert [{step for step, _, _ in events} for events in found] == [{1}, {2}]


@pytest.mark.parametrize(("seconds", "wanted"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3725.0, "62 min 5 s")])
def test_what_is_left_is_the_median_epoch_times_those_to_come(tmp_path: Path, seconds: float, wanted: str) -> None:
    lines: list[str] = []
    TrainingLog(RunFolder(str(tmp_path)), {}, 2, lines.append)(_row(1, seconds=seconds))
    assert lines[0].endswith(f" {wanted} left")
