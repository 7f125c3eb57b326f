"""How the net that says scales as numbers is trained on annotated images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scalenet_ray.core.coco import Objects
from scalenet_ray.core.samples import write_sample
from scalenet_ray.core.window import Tile, Window
from scalenet_ray.models.examples import Example, TrainingImages
from scalenet_ray.models.recipe import Batch, forward_backward
from scalenet_ray.models.regression_recipe import RegressionRecipe, _scales
from scalenet_ray.models.scale_net import PRESETS
from scalenet_ray.models.scale_recipe import View


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> RegressionRecipe:
    folder = write_sample(tmp_path_factory.mktemp("scales") / "sample", train=4, val=2)
    return RegressionRecipe(TrainingImages(str(folder)), PRESETS["fcn-digits"], 64)


def batch(rows: list[dict[str, np.ndarray]]) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def view_of(window: Window, hw: tuple[int, int], mirrored: bool = False) -> View:
    return View(Tile(1, (), (40, 80), window, *hw), np.zeros((*hw, 3), np.uint8), mirrored)


def objects(boxes: list[list[float]], crowd: list[bool]) -> Example:
    array = np.array(boxes, np.float32)
    areas = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    labels = np.ones(len(boxes), np.int64)
    return Example(1, "nowhere", (40, 80), Objects(array, areas, labels, np.array(crowd), (None,) * len(boxes)))


def test_scales_are_sides_in_tile_pixels_over_sixteen() -> None:
    example = objects([[0, 0, 8, 4], [40, 10, 72, 26]], [False, False])
    whole = _scales(example, view_of(Window(0, 0, 80, 40), (40, 80)))
    assert whole[2, 4] == 0.5
    assert whole[20, 60] == 2
    assert (whole > 0).sum() == 8 * 4 + 32 * 16
    # Twice as large in a window at zoom 2, though half of it is cut away; on the other side when mirrored.
    window = _scales(example, view_of(Window(56, 0, 80, 40), (80, 48)))
    assert window.shape == (80, 48)
    assert window[40, 0] == 4
    assert window[40, 40] == 0
    mirrored = _scales(example, view_of(Window(56, 0, 80, 40), (80, 48), mirrored=True))
    assert np.array_equal(mirrored, window[:, ::-1])


def test_crowds_have_no_scale() -> None:
    assert _scales(objects([[0, 0, 8, 4]], [True]), view_of(Window(0, 0, 80, 40), (40, 80))).max() == 0


def test_rows_stack_and_are_the_same_for_the_same_arguments(recipe: RegressionRecipe) -> None:
    rows = [recipe.example(0, 0), recipe.example(1, 0), recipe.validation_example(0), recipe.blank()]
    stacked = batch(rows)
    assert stacked["image"].shape == (4, 64, 64, 3)
    assert stacked["scale"].shape == (4, 64, 64)
    assert np.array_equal(recipe.example(0, 0)["image"], rows[0]["image"])
    assert not np.array_equal(recipe.example(0, 1)["image"], rows[0]["image"])
    assert rows[3]["scale"].max() == 0
    assert recipe.sizes() == (4, 2)


def test_a_few_steps_lower_the_loss_and_blanks_do_not_count(recipe: RegressionRecipe) -> None:
    torch.manual_seed(0)
    model = recipe.build()
    rows = batch([recipe.validation_example(0), recipe.validation_example(1)])
    before = recipe.figures(recipe.count(model, rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    for _ in range(15):
        optimizer.zero_grad()
        loss = forward_backward(model, rows, recipe.loss)
        optimizer.step()
    after = recipe.figures(recipe.count(model, rows))
    assert after["loss"] < before["loss"] * 0.8
    assert after["loss"] == pytest.approx(float(loss), rel=0.2)
    assert before["minus_error"] < after["minus_error"] < 0
    assert recipe.loss(model, batch([recipe.blank()])) == 0
    assert recipe.figures(recipe.count(model, batch([recipe.blank()])))["loss"] == 0
