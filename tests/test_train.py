"""Training on Ray Train: resuming, losses of workers, and what a run leaves in its folder."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import deque
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scalenet_ray.commands.arguments import check_arguments
from scalenet_ray.core.errors import UserError
from scalenet_ray.data import storage
from scalenet_ray.engine import train as driver
from scalenet_ray.engine.train import train
from scalenet_ray.engine.train_worker import make_batch, make_schedule, read_batch
from scalenet_ray.models.scale_net import load_scale_net
from scalenet_ray.models.scale_networks import PRESETS
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.training.recipe import Recipe
from scalenet_ray.training.schedule import Epochs, Training
from tests.job_scripts import REPOSITORY, load_job
from tests.ray_fixture import own_ray_environment
from tests.training_fakes import Faulty, SmallRecipe

Weights = dict[str, torch.Tensor]
Rows = list[dict[str, Any]]

NOISY = SmallRecipe(noisy=True)
THREE_EPOCHS = Training(batch_size=4, epochs=3, keep=1)
SNAPSHOT = "checkpoints/checkpoint_manager_snapshot.json"


@pytest.fixture(scope="module", autouse=True)
def quick_reports() -> Any:
    """Ray Train looks after its workers every 2 seconds, which is longer than an epoch here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        # One process less to start.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield


def run(recipe: Recipe, training: Training, folder: Path) -> tuple[Weights, Rows]:
    """Train to the end: the weights, and the rows."""
    rows: Rows = []
    train(recipe, training, str(folder), rows.append)
    return load_file(folder / recipe.file_name), rows


def same(one: Weights, other: Weights) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    """What is in the checkpoints of a run, in the order in which they were made."""
    paths = sorted((folder / "checkpoints").glob("checkpoint_*/state.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def outcomes(rows: Rows) -> Rows:
    """The rows without what a clock has measured."""
    return [{name: row[name] for name in ("epoch", "loss", "val", "failed")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Rows, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return *run(NOISY, THREE_EPOCHS, folder), folder


@pytest.fixture(scope="module")
def alone(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Rows]:
    """One worker, no batch norm."""
    return run(SmallRecipe(), THREE_EPOCHS, tmp_path_factory.mktemp("alone"))


# --- a run and its end ----------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_each_epoch_is_reported_and_the_best_and_the_last_checkpoint_stay(
    undisturbed: tuple[Weights, Rows, Path],
) -> None:
    weights, rows, folder = undisturbed
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 and not row["failed"] for row in rows)
    assert [row["val"]["seen"] for row in rows] == [[1.0] * 5] * 3
    kept = {state["epoch"] for state in checkpoints(folder)}
    best = max(rows, key=lambda row: row["val"]["minus_loss"])["epoch"]
    assert kept == {best, 3}
    last = checkpoints(folder)[-1]
    assert last["epoch"] == 3
    assert same(last["model"], weights)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_stay_in_the_folder_where_ray_was_started(undisturbed: tuple[Weights, Rows, Path]) -> None:
    assert {row["val"]["folder"] for row in undisturbed[1]} == {os.getcwd()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_taken_up_again_ends_with_the_same_weights(
    idle_ray: None, undisturbed: tuple[Weights, Rows, Path], tmp_path: Path
) -> None:
    marker, folder = tmp_path / "struck", tmp_path / "run"
    killed = Faulty(NOISY, killed_at=4, marker=marker, after=folder / SNAPSHOT)
    before: Rows = []
    with pytest.raises(RuntimeError, match=r"training stopped: .*worker.* died.*; the last checkpoint is in .*/run: "):
        train(killed, replace(THREE_EPOCHS, max_restarts=0), str(folder), before.append)  # type: ignore[arg-type]
    assert marker.exists()
    assert not (folder / NOISY.file_name).exists()
    assert [state["epoch"] for state in checkpoints(folder)] == [1]
    weights, after = run(NOISY, THREE_EPOCHS, folder)
    assert [row["epoch"] for row in before + after] == [1, 2, 3]
    assert outcomes(before + after) == outcomes(undisturbed[1])
    assert same(weights, undisturbed[0])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_worker_that_is_killed_is_replaced_and_the_weights_are_the_same(
    idle_ray: None, undisturbed: tuple[Weights, Rows, Path], tmp_path: Path
) -> None:
    marker, folder = tmp_path / "struck", tmp_path / "run"
    recipe = Faulty(NOISY, killed_at=4, marker=marker, after=folder / SNAPSHOT)
    weights, rows = run(recipe, THREE_EPOCHS, folder)  # type: ignore[arg-type]
    assert marker.exists()
    assert outcomes(rows) == outcomes(undisturbed[1])
    assert same(weights, undisturbed[0])


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_it_can_be_taken_up(
    idle_ray: None, undisturbed: tuple[Weights, Rows, Path], tmp_path: Path
) -> None:
    full = Faulty(NOISY, full_after=2)
    message = r"training stopped: \[Errno 28\] No space left on device: .*; the last checkpoint is in .*: fix it"
    with pytest.raises(UserError, match=message):
        train(full, replace(THREE_EPOCHS, max_restarts=0), str(tmp_path), lambda row: None)  # type: ignore[arg-type]
    assert checkpoints(tmp_path)[-1]["epoch"] == 2
    weights, rows = run(NOISY, THREE_EPOCHS, tmp_path)
    assert [row["epoch"] for row in rows] == [3]
    assert same(weights, undisturbed[0])


@pytest.mark.ray
@pytest.mark.slow
def test_a_nan_loss_stops_with_the_step_and_the_images_and_is_not_tried_again(idle_ray: None, tmp_path: Path) -> None:
    rows: Rows = []
    # Steps 0 to 2 are the first epoch.
    recipe = Faulty(SmallRecipe(), nan_at=4)
    epochs = Epochs(12, 5, 4, 1, seed=0)
    ids = ", ".join(str(100 + pick.example) for pick in epochs.picks(epochs.steps + 1, 0) if pick is not None)
    with pytest.raises(ValueError, match=rf"the loss is nan .* at step 4 \(images {ids}\): lower the learning rate"):
        train(recipe, THREE_EPOCHS, str(tmp_path), rows.append)  # type: ignore[arg-type]
    assert [row["epoch"] for row in rows] == [1]
    assert [state["epoch"] for state in checkpoints(tmp_path)] == [1]
    assert not (tmp_path / "small.safetensors").exists()


# --- how a batch is worked through ----------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_as_one_in_parts_of_a_batch_and_see_each_validation_image_once(
    idle_ray: None, alone: tuple[Weights, Rows], tmp_path: Path
) -> None:
    weights, rows = run(SmallRecipe(), replace(THREE_EPOCHS, workers=2, accumulate=2, readers=2), tmp_path)
    assert [row["val"]["seen"] for row in rows] == [[1.0] * 5] * 3
    torch.testing.assert_close(weights, alone[0], rtol=1e-3, atol=1e-4)
    wanted = [row["val"]["loss"] for row in alone[1]]
    assert [row["val"]["loss"] for row in rows] == pytest.approx(wanted, rel=1e-3)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[1]], rel=1e-3)


def test_an_example_that_cannot_be_used_is_left_blank_and_named() -> None:
    recipe = SmallRecipe(unreadable=(3, 5))
    epochs = Epochs(12, 5, 12, 1, seed=0)
    table = make_batch(recipe, epochs.picks(0, 0))
    assert table.num_rows == 1
    arrays, failed = read_batch(table)
    assert sorted(failed) == ["image 103 cannot be read", "image 105 cannot be read"]
    order = [100 + pick.example for pick in epochs.picks(0, 0) if pick is not None]
    assert arrays["image_id"].ravel().tolist() == [0 if i in (103, 105) else i for i in order]
    assert arrays["counts"].sum() == 10
    assert read_batch(make_batch(recipe, epochs.picks(1, 0)))[0]["counts"].sum() == 5


def test_the_learning_rate_rises_and_falls_to_nothing_and_is_taken_up() -> None:
    def rates(steps: int, done: int = 0) -> list[float]:
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = make_schedule(optimizer, steps, done)
        found = []
        for _ in range(steps - done):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(100)
    assert whole[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert np.all(np.diff(whole[5:]) < 0)
    assert 0 < whole[-1] < 0.01
    assert rates(100, 40) == pytest.approx(whole[40:])
    assert rates(1) == [1.0]


class _News:
    """What workers have said, all at once."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self._rows = deque(rows)

    def empty(self) -> bool:
        return not self._rows

    def get(self) -> dict[str, Any]:
        return self._rows.popleft()

    def shutdown(self) -> None:
        pass


def test_a_report_that_fails_does_not_drown_what_follows() -> None:
    said = []

    def report(row: dict[str, Any]) -> None:
        said.append(row["epoch"])
        if row["epoch"] in broken:
            msg = f"cannot write after epoch {row['epoch']}"
            raise OSError(msg)

    def listen(*rows: dict[str, Any]) -> list[str]:
        with driver._forwarded(_News(*rows), report) as stopped:  # type: ignore[arg-type]
            pass
        return stopped

    broken = {1}
    assert listen({"epoch": 1}, {"epoch": 2}) == []
    assert listen({"epoch": 1}, {"stopped": "nan"}) == ["nan"]
    broken = {2}
    with pytest.raises(OSError, match="cannot write after epoch 2"):
        listen({"epoch": 1}, {"epoch": 2})
    assert said == [1, 2, 1, 1, 2]


def test_a_report_with_a_bug_ends_the_run_with_it() -> None:
    with (
        pytest.raises(KeyError, match="loss"),
        driver._forwarded(_News({"epoch": 1}), lambda row: row["loss"]),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": 0}, "--workers must be 1 or more, got 0"),
        ({"keep": 0}, "--keep must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, r"--learning-rate must be a number above 0, got 0\.0"),
        ({"clip_norm": -1.0}, r"--clip-norm must be a number above 0, got -1\.0"),
        ({"max_restarts": -1}, "--max-restarts must be a number of 0 or more, got -1"),
        (
            {"workers": 2, "accumulate": 3},
            "batch_size must be a multiple of 2 workers x 3 parts, got 16: change one of them",
        ),
    ],
)
def test_a_training_out_of_range_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(Training(**wrong))


# --- the job --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its objects have boxes alone, and image 3 is truncated."""
    data = write_sample(tmp_path_factory.mktemp("sample") / "sample", train=8, val=3)
    for path in (data / "annotations").iterdir():
        document = json.loads(path.read_text())
        for annotation in document["annotations"]:
            del annotation["segmentation"]
        path.write_text(json.dumps(document))
    picture = data / "train2017" / "000000000003.jpg"
    picture.write_bytes(picture.read_bytes()[:2000])
    return data


def job_on(data: Path, output: Path | str, **changes: Any) -> Any:
    training = Training(batch_size=4, epochs=2)
    job = load_job("train_scalenet").TrainScaleNet(
        data=str(data), output=str(output), input_side=32, tile_side=64, training=training
    )
    return replace(job, **changes)


def main(job: Any) -> int:
    return load_job("train_scalenet").main(job)


@pytest.fixture(scope="module")
def trained(ray_session: None, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of the job, and what it said."""
    output = tmp_path_factory.mktemp("job") / "run"
    with redirect_stdout(io.StringIO()) as said:
        assert main(job_on(sample, output)) == 0
    return output, said.getvalue().splitlines()


@pytest.mark.ray
def test_the_job_trains_and_writes_its_run_folder(trained: tuple[Path, list[str]]) -> None:
    folder, lines = trained
    _, config = load_scale_net(folder / "scale_net.safetensors")
    assert config == replace(PRESETS["unet-light"], input_side=32)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["val_images"]) == (8, 3)
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert len(metrics["epochs"][-1]["val"]["iou"]) == 6
    text = (folder / "config.yaml").read_text()
    assert "input_side: 32" in text
    assert "batch_size: 4" in text
    assert {path.name[-5:] for path in (folder / "tensorboard").iterdir()} == {"00001", "00002"}
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1] == f"2 epochs done, weights in {folder}/scale_net.safetensors"


@pytest.mark.ray
def test_boxes_stand_in_for_segmentations_and_that_is_said_once(sample: Path, trained: tuple[Path, list[str]]) -> None:
    documents = [json.loads(path.read_text()) for path in (sample / "annotations").iterdir()]
    objects = sum(len(document["annotations"]) for document in documents)
    said = [line for line in trained[1] if "segmentation" in line]
    assert said == [f"{objects} objects have no segmentation: the pixels of their boxes stand in"]


@pytest.mark.ray
def test_a_truncated_jpeg_is_left_out_and_named(sample: Path, trained: tuple[Path, list[str]]) -> None:
    folder, lines = trained
    (failed,) = json.loads((folder / "metrics.json").read_text())["failed"]
    assert failed.startswith(f"image 3, {sample}/train2017/000000000003.jpg: ")
    assert lines[-2] == f"left out: {failed}"


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_takes_up_a_run_and_goes_on_where_it_stopped(
    idle_ray: None, sample: Path, trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = trained
    weights = (folder / "scale_net.safetensors").read_bytes()
    metrics = (folder / "metrics.json").read_bytes()
    (folder / "scale_net.safetensors").unlink()
    # What the weights do not depend on may have changed.
    assert main(job_on(sample, folder, resume=True, training=Training(batch_size=4, epochs=2, readers=2, keep=3))) == 0
    assert (folder / "scale_net.safetensors").read_bytes() == weights
    assert (folder / "metrics.json").read_bytes() == metrics
    # No epoch was left to do.
    assert capsys.readouterr().out.splitlines() == [line for line in lines if not line.startswith("epoch")]


@pytest.mark.slow
def test_on_s3_a_run_leaves_the_same_and_says_little(sample: Path, s3_bucket: str) -> None:
    """In a process of its own: Ray's workers have the environment in which it was started."""
    output = f"{s3_bucket}/runs/a"
    flags = ["--data", str(sample), "--input-side", "32", "--batch-size", "8", "--epochs", "2", "--output", output]
    done = subprocess.run(
        [sys.executable, "jobs/train_scalenet.py", *flags],
        cwd=REPOSITORY,
        env=own_ray_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert said[1:3] == ["epoch 1/2", "epoch 2/2"]
    assert len(said) == 5
    noise = [line for line in done.stderr.splitlines() if "(TrainController" in line or "(RayTrainWorker" in line]
    assert noise == []
    metrics = json.loads(storage.read_bytes(f"{output}/metrics.json"))
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert len(storage.list_files(f"{output}/tensorboard", ())) == 2
    names = [
        uri.removeprefix(f"{output}/checkpoints/") for uri in storage.list_files(f"{output}/checkpoints", (".pt",))
    ]
    assert len(names) == 2
    assert storage.exists(f"{output}/scale_net.safetensors")
