"""The paper's experiments on small data: data, training, scores, figures, jobs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10 as CIFAR10_FILES

from scalenet_ray.commands.arguments import check_arguments
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.core.windows import top_k_mean
from scalenet_ray.experiments.config import CIFAR10, DIGITS, MNIST, CanvasRecipe, NetRecipe, ablations
from scalenet_ray.experiments.data import Pictures, centred, load_pictures, resized
from scalenet_ray.experiments.evaluate import (
    ObjectScales,
    pictures_at,
    response_plot,
    score_classifier,
    score_recursion,
    set_names,
    steps_plot,
)
from scalenet_ray.experiments.rescale import rescale_canvases
from scalenet_ray.experiments.run import Experiment, plan_tasks, tabulate
from scalenet_ray.experiments.tasks import Task
from scalenet_ray.experiments.train import as_input, train_classifier, train_net
from scalenet_ray.models.scale_net import normalised
from tests.job_scripts import load_job

SVG = "{http://www.w3.org/2000/svg}"


def squares(count: int) -> Pictures:
    """White squares that fill the picture (class 0), and ones with a hole (class 1)."""
    pixels = np.full((count, 28, 28, 3), 255, np.uint8)
    pixels[1::2, 8:20, 8:20] = 40
    return Pictures(pixels, np.arange(count) % 2)


class KnowsScale:
    """Oracle scale predictor of squares: their visible side over 16."""

    input_pixels = 0

    def __call__(self, pixels: Any, tiles: Any) -> list[ScaleMap]:
        sides = [(canvas.max(2) > 0).any(0).sum() for canvas in pixels]
        return [ScaleMap(scale=np.full(canvas.shape[:2], s / 16)) for canvas, s in zip(pixels, sides, strict=True)]


class Template(torch.nn.Module):
    """Knows the two classes at 16 pixels in the middle of a canvas, by their middle, and else says class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros(1))

    def forward(self, canvases: torch.Tensor) -> torch.Tensor:
        fits = (canvases[:, 0, 6, 7:21].mean(1) > 0.9) & (canvases[:, 0, :6].amax((1, 2)) == 0)
        hole = (canvases[:, 0, 13, 13] < 0.5) & fits
        return torch.stack([~hole, hole], 1).float()


# --- data -----------------------------------------------------------------------------------------------------


def test_scikit_learns_digits_are_split_and_enlarged() -> None:
    train_set, test_set = (load_pictures("digits", None, train=train) for train in (True, False))
    assert train_set.pixels.shape == (1198, 28, 28, 3)
    assert test_set.pixels.shape == (599, 28, 28, 3)
    assert {*train_set.labels} == {*test_set.labels} == set(range(10))
    assert not {picture.tobytes() for picture in train_set.pixels} & {picture.tobytes() for picture in test_set.pixels}


def test_mnist_is_read_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    raw, rng = tmp_path / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = rng.integers(0, 10, shape, np.uint8)
            sides = b"".join(side.to_bytes(4, "big") for side in shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sides + array.tobytes())
    tested = load_pictures("mnist", str(tmp_path), train=False)
    assert tested.pixels[..., 2].tobytes() == (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert tested.labels.tolist() == list((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:])
    assert len(load_pictures("mnist", str(tmp_path), train=True).labels) == 4


def test_packed_mnist_is_read_and_nothing_is_written_beside_it() -> None:
    data = os.environ.get("SCALENET_RAY_DATA")
    if not data:
        pytest.skip("set SCALENET_RAY_DATA to a folder with mnist/MNIST/raw")
    before = sorted(Path(data, "mnist", "MNIST", "raw").iterdir())
    tested = load_pictures("mnist", f"{data}/mnist", train=False)
    assert sorted(Path(data, "mnist", "MNIST", "raw").iterdir()) == before
    assert tested.pixels.shape == (10_000, 28, 28, 3)
    assert tested.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert (tested.pixels[..., 0] == tested.pixels[..., 2]).all()


def test_cifar_is_read_though_its_files_were_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels.reshape(4, -1), "labels": [3, 1, 4, 1]}))
    names = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(names)
    # The names of the classes are the one file that cannot have been rewritten.
    monkeypatch.setitem(CIFAR10_FILES.meta, "md5", hashlib.md5(names).hexdigest())
    tested = load_pictures("cifar10", str(tmp_path), train=False)
    assert tested.labels.tolist() == [3, 1, 4, 1]
    assert np.array_equal(tested.pixels, pixels.transpose(0, 2, 3, 1))


def test_data_that_cannot_be_had_is_told_of() -> None:
    with pytest.raises(ValueError, match=r"mnist needs --data, the folder .*, got none"):
        load_pictures("mnist", None, train=True)


def test_held_out_digits_are_tested_on_and_not_learned() -> None:
    whole = load_pictures("digits", None, train=True)
    experiment = Experiment("digits", None, "nowhere", held_out=98, test_limit=50)
    assert np.array_equal(experiment.train_set().pixels, whole.pixels[:1100])
    assert np.array_equal(experiment.test_set().labels, whole.labels[1100:1150])
    assert len(replace(experiment, held_out=0, test_limit=None).test_set().labels) == 599
    with pytest.raises(ValueError, match="held_out must leave pictures to train on, got 2000 of 1198"):
        replace(experiment, held_out=2000).train_set()


# --- the sets -------------------------------------------------------------------------------------------------


def test_sets_are_the_trained_sides_on_their_canvas_and_native_frames() -> None:
    pictures = squares(2)
    validation = pictures_at(pictures, "validation", MNIST)
    assert [(side, found[0].shape) for side, found in validation] == [(side, (28, 28, 3)) for side in (14, 16, 18)]
    assert np.array_equal(validation[0][1][0], centred(resized(pictures.pixels[0], 14, "bilinear"), 28))
    ((side, found),) = pictures_at(pictures, "84", MNIST)
    assert (side, found[1].shape) == (84, (84, 84, 3))
    ((_, plain),) = pictures_at(pictures, "8", MNIST)
    ((_, nearest),) = pictures_at(pictures, "8-nearest", MNIST)
    assert plain[1].shape == nearest[1].shape == (8, 8, 3)
    assert len(np.unique(plain[1])) > len(np.unique(nearest[1])) == 2
    assert set_names(MNIST)[0] == "validation"
    assert {"112", "140", "8-bilinear-aliased"} < set(set_names(MNIST))
    assert set_names(CIFAR10) == ["validation", "96"]


def test_scores_of_a_classifier_that_knows_one_scale() -> None:
    pictures, classifier = squares(20), Template()
    # Of the three sides on the canvas it knows one, and half of what it does not know it gets right.
    assert score_classifier(classifier, pictures, "validation", MNIST).accuracy == pytest.approx(
        100 * (0.5 + 1 + 0.5) / 3
    )
    assert score_classifier(classifier, pictures, "56", MNIST).accuracy == 50
    for name in ("28", "56", "84", "8", "140"):
        score = score_recursion(classifier, KnowsScale(), CanvasRecipe(), pictures, name, MNIST)
        assert score.accuracy == 100
        assert score.capped == 0
    assert score_recursion(classifier, KnowsScale(), CanvasRecipe(), pictures, "84", MNIST).steps == 1


def test_a_pale_picture_is_the_same_to_a_classifier() -> None:
    canvases = np.zeros((2, 8, 8, 3), np.uint8)
    canvases[:, 2:5, 2:5] = 200
    canvases[1] //= 2
    bright, pale = as_input(canvases, 1)
    assert bright.shape == (1, 8, 8)
    assert bright.max() == 1.0
    assert torch.equal(bright, pale)
    assert as_input(np.zeros((1, 8, 8, 3), np.uint8), 1).max() == 0.0


def test_an_objects_pixels_count_even_where_the_net_says_nothing() -> None:
    def half_blind(pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap]:
        del tiles
        return [
            ScaleMap(scale=np.where(np.arange(canvas.shape[1]) < 4, 0.0, 2.0) + 0 * canvas[..., 0]) for canvas in pixels
        ]

    half_blind.input_pixels = 64  # type: ignore[attr-defined]
    canvas = centred(np.full((4, 4, 3), 9, np.uint8), 8)
    (seen,) = ObjectScales(half_blind)([canvas], [Tile])  # type: ignore[list-item,arg-type]
    assert isinstance(seen, ScaleMap)
    assert seen.scale is not None
    # Half of the object is seen at 2: its mean is what the net was trained for.
    assert top_k_mean(seen.scale, 1.0) == pytest.approx(1.0, abs=1e-5)


def test_a_net_that_says_nothing_at_all_sees_no_object() -> None:
    def blind(pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap]:
        del tiles
        return [ScaleMap(scale=np.zeros(canvas.shape[:2], np.float32)) for canvas in pixels]

    blind.input_pixels = 64  # type: ignore[attr-defined]
    picture = np.full((8, 8, 3), 9, np.uint8)
    recipe = MNIST.recipes["scalenet"]
    (result,) = rescale_canvases([picture], recipe.recursion(8, 28), recipe.rules, ObjectScales(blind))  # type: ignore[arg-type]
    assert result.sides == (8,)


def test_the_papers_two_settings_each_go_one_way() -> None:
    paper = MNIST.recipes["scalenet_paper"]
    large, small = paper.recursion(28, 28).scale_range, paper.recursion(8, 28).scale_range
    assert large.low < 0.01
    assert (large.high, small.low) == (1.05, 0.99)
    assert small.high > 100
    assert MNIST.recipes["scalenet"].recursion(8, 28).scale_range == (0.95, 1.05)


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "least"), [("mean", 0.2), ("pixels", 0.01)])
def test_a_net_learns_how_large_squares_are(loss: Any, least: float) -> None:
    """Each pixel by itself can learn less of it: the middle of a square looks alike at all sides."""
    recipe = NetRecipe(loss=loss, epochs=8.0, batch_size=16)
    model = train_net(squares(120), DIGITS, recipe, seed=0)
    means = []
    for side in (14, 18):
        canvas = centred(np.full((side, side, 3), 255, np.uint8), 28)
        with torch.inference_mode():
            found = model(normalised(torch.from_numpy(canvas[None]), recipe.config(1)))[0].numpy()
        means.append(found[canvas[..., 0] > 0].mean())
    assert means[1] - means[0] > least
    assert np.mean(means) == pytest.approx(1.0, abs=0.06)


def test_training_is_the_same_for_the_same_seed_and_a_classifier_learns() -> None:
    recipe = replace(DIGITS.classifiers["classifier"], epochs=6.0, batch_size=16)
    first, again, other = (train_classifier(squares(64), DIGITS, recipe, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert score_classifier(first, squares(20), "validation", DIGITS).accuracy == 100


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    recipe = replace(DIGITS.classifiers["classifier"], learning_rate=1e12, batch_size=16)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+ of \d+: lower the learning rate"):
        train_classifier(squares(120), DIGITS, recipe, seed=0)


# --- the plan and the table -----------------------------------------------------------------------------------


def test_nets_that_are_trained_alike_are_trained_once() -> None:
    tasks = plan_tasks(Experiment("mnist", "d", "w"), MNIST.recipes, range(2))
    names = [task.name for task in tasks]
    assert len(names) == len(set(names))
    assert sorted(name for name in names if name.startswith("net")) == ["net-s0", "net-s1", "net1-s0", "net1-s1"]
    by_name = {task.name: task for task in tasks}
    assert by_name["scalenet--84--s1"].after == ("net-s1", "classifier-s1")
    assert by_name["scalenet_paper--84--s1"].after == ("net1-s1", "classifier-s1")
    assert by_name["oracle--84--s1"].after == ("classifier-s1",)
    assert by_name["capsnet--84--s1"].after == ("capsnet-s1",)
    assert all(name in names for task in tasks for name in task.after)


def test_each_ablation_changes_the_recipe() -> None:
    variants = ablations(MNIST.recipes["scalenet"])
    assert len(set(variants.values())) == len(variants)


def test_a_table_has_means_and_deviations_over_seeds() -> None:
    scores = {
        ("scalenet", 0): {"accuracy": 98.0, "steps": 4.0, "capped": 0.0, "once": 30.0},
        ("scalenet", 1): {"accuracy": 99.0, "steps": 5.0, "capped": 1.0, "once": 32.0},
        ("classifier", 0): {"accuracy": 10.0, "steps": 0.0, "capped": 0.0, "once": None},
        ("oracle", 0): {"accuracy": 99.5, "steps": 1.0, "capped": 0.0, "once": 99.5},
    }
    tasks = [Task("net-s0", dict)]
    tasks += [Task(f"{method}-{seed}", dict, method=method, test_set="84") for method, seed in scores]
    outcomes = dict(zip((task.name for task in tasks), ({"parameters": 3}, *scores.values()), strict=True))
    assert tabulate(tasks, outcomes) == {
        "scalenet": {"84": {"mean": 98.5, "std": pytest.approx(0.5**0.5), "steps": 4.5, "capped": 0.5}},
        "once": {"84": {"mean": 31.0, "std": pytest.approx(2.0**0.5)}},
        "oracle": {"84": {"mean": 99.5, "std": 0.0, "steps": 1.0, "capped": 0.0}},
        "classifier": {"84": {"mean": 10.0, "std": 0.0}},
    }


# --- the pictures ---------------------------------------------------------------------------------------------


def test_the_pictures_say_what_they_show() -> None:
    steps = {"canvases": [np.zeros((n, n)).tolist() for n in (28, 16)], "maps": [np.full((28, 28), 1.5).tolist()]}
    texts = {element.text for element in ET.fromstring(steps_plot(steps)).iter(f"{SVG}text")}
    assert {"28 px", "16 px", "scale 1.50"} <= texts
    response = {"true": [0.5, 1.0, 2.0], "predicted": [0.7, 1.0, 1.4]}
    texts = {element.text for element in ET.fromstring(response_plot(response)).iter(f"{SVG}text")}
    assert "true scale (1: the unit side)" in texts


# --- the jobs -------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_on_small_digits_zooms_rightly_and_resumes(
    idle_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_job("eval_digits")
    job = module.EvalDigits(seeds=1, test_limit=90, output=str(tmp_path / "run"))
    assert module.main(job) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["trained_on"], metrics["tested_on"], metrics["seeds"]) == (1198, 90, 1)
    scores = {method: {name: row["mean"] for name, row in rows.items()} for method, rows in metrics["digits"].items()}
    assert scores["classifier"]["validation"] > 90
    assert scores["classifier"]["56"] < 50 < 90 < scores["scalenet"]["56"]
    assert scores["once"]["56"] < 50
    assert scores["scalenet"]["28"] > 90 < scores["scalenet"]["8"]
    assert metrics["digits"]["scalenet"]["56"]["steps"] > 1
    assert metrics["digits"]["scalenet"]["56"]["capped"] == 0
    for name in ("response.svg", "steps.svg", "weights/net-s0.safetensors", "units/scalenet--56--s0.json"):
        assert (tmp_path / "run" / name).exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("trained on 1198, tested on 90 pictures, 1 seeds")

    (tmp_path / "run" / "units" / "scalenet--56--s0.json").unlink()
    assert module.main(replace(job, resume=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" done: " in line for line in lines) == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


@pytest.mark.parametrize("name", ["eval_digits", "eval_cifar"])
def test_jobs_refuse_to_choose_on_the_test_set(name: str, tmp_path: Path) -> None:
    module = load_job(name)
    cls = module.EvalDigits if name == "eval_digits" else module.EvalCifar
    with pytest.raises(ValueError, match="which the test set must not: add --held-out"):
        module.main(cls(data=str(tmp_path), ablation=True, output=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="--seeds must be 1 or more, got 0"):
        check_arguments(cls(data=str(tmp_path), seeds=0))
