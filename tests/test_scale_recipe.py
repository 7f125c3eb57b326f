"""Training of the Scale Net: examples, targets, losses and metrics."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Window
from scalenet_ray.core.scale import IGNORE
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.scale_net import load_scale_net
from scalenet_ray.models.scale_networks import PRESETS
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.training.examples import object_mask, read_examples, tile_of_window, whole_image
from scalenet_ray.training.losses import count_pixels, focal_loss, pixel_figures
from scalenet_ray.training.recipe import Batch, Row, clip_and_step, forward_backward
from scalenet_ray.training.scale_recipe import (
    CLASS_WEIGHTS,
    ScaleRecipe,
    TrainingImages,
    class_map,
    random_view,
    whole_view,
    window_target,
)
from tests.float64 import in_float64
from tests.test_rasters import write_tiff

LIGHT = replace(PRESETS["unet-light"], input_side=64)
WHOLE = Window(0, 0, 64, 64)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample") / "sample", train=8, val=3)


@pytest.fixture
def recipe(sample: Path) -> ScaleRecipe:
    return ScaleRecipe(TrainingImages(str(sample)), LIGHT)


def _batch(*rows: Row) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _same(one: Row, other: Row) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _objects(*boxes: tuple[int, int, int, int], crowd: bool = False, segmentations: tuple | None = None) -> Objects:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1).astype(np.float64)
    count = len(array)
    return Objects(array, areas, np.ones(count, np.int64), np.full(count, crowd), segmentations or (None,) * count)


# --- targets --------------------------------------------------------------------------------------------------


def test_a_box_stands_in_where_there_is_no_polygon() -> None:
    # 16 x 16 of 64 x 64 pixels are 16,384 of 512 x 512: class 2.
    target = window_target(_objects((16, 32, 32, 48)), (64, 64), WHOLE, (16, 16))
    wanted = np.zeros((16, 16), np.uint8)
    wanted[8:12, 4:8] = 2
    np.testing.assert_array_equal(target, wanted)


def test_polygons_and_run_lengths_give_the_same_target() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[32:48, 16:32] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    by_text = {"size": [64, 64], "counts": rle["counts"].decode("ascii")}
    by_list = {"size": [64, 64], "counts": [16 * 64 + 32, *([16, 48] * 15), 16, 64 * 32 + 16]}
    polygon = [[16, 32, 32, 32, 32, 48, 16, 48]]
    box = (16, 32, 32, 48)
    targets = [
        window_target(_objects(box, segmentations=(form,)), (64, 64), WHOLE, (16, 16))
        for form in (polygon, by_text, by_list, None)
    ]
    assert targets[0].any()
    for target in targets[1:]:
        np.testing.assert_array_equal(target, targets[0])


def test_classes_are_those_of_the_windows_own_frame() -> None:
    # 4 x 4 of 64 x 64 pixels are 1,024 of 512 x 512, class 1; in a window of half the side 4,096, class 2.
    objects = _objects((40, 40, 44, 44))
    whole = window_target(objects, (64, 64), WHOLE, (16, 16))
    zoomed = window_target(objects, (64, 64), Window(32, 32, 64, 64), (16, 16))
    assert whole[10, 10] == 1
    assert (whole > 0).sum() == 1
    assert zoomed[4, 4] == 2
    assert (zoomed > 0).sum() == 4


def test_an_object_smaller_than_a_cell_keeps_one() -> None:
    target = window_target(_objects((21, 21, 22, 22)), (64, 64), WHOLE, (16, 16))
    assert np.argwhere(target == 1).tolist() == [[5, 5]]


def test_an_object_that_the_window_cuts_keeps_the_class_of_the_whole() -> None:
    target = window_target(_objects((0, 0, 34, 64)), (64, 64), Window(32, 0, 64, 32), (16, 16))
    assert set(np.unique(target)) == {0, 5}


def test_crowds_are_ignored() -> None:
    target = window_target(_objects((16, 32, 32, 48), crowd=True), (64, 64), WHOLE, (16, 16))
    assert (target == IGNORE).sum() == 16
    assert set(np.unique(target)) == {0, IGNORE}


# --- views and examples ---------------------------------------------------------------------------------------


def test_the_whole_view_is_the_image_with_its_longer_side_at_the_tiles(sample: Path) -> None:
    for example in read_examples(str(sample), "val2017"):
        view = whole_view(example, 96)
        assert example.hw is not None
        assert max(view.pixels.shape[:2]) == 96
        assert view.tile.window == Window(0, 0, example.hw[1], example.hw[0])
        assert not view.mirrored


def test_a_random_view_is_a_window_mirrored_or_not_with_its_own_map(sample: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    views = [random_view(example, 96, np.random.default_rng(seed)) for seed in range(16)]
    assert {view.mirrored for view in views} == {True, False}
    assert len({view.tile.window for view in views}) > 4
    assert any(view.tile.window.area == view.tile.image_hw[0] * view.tile.image_hw[1] for view in views)
    for view in views:
        plain = window_target(example.objects, view.tile.image_hw, view.tile.window, (16, 16))
        np.testing.assert_array_equal(class_map(example, view, (16, 16)), plain[:, ::-1] if view.mirrored else plain)


def test_a_random_views_colours_change_and_its_scene_does_not(sample: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    rngs = (np.random.default_rng(seed) for seed in range(64))
    whole = next(
        view
        for view in (random_view(example, 96, rng) for rng in rngs)
        if view.tile.window == whole_view(example, 96).tile.window
    )
    pixels = whole.pixels[:, ::-1] if whole.mirrored else whole.pixels
    plain = whole_view(example, 96).pixels
    assert not np.array_equal(pixels, plain)
    assert np.corrcoef(pixels.ravel(), plain.ravel())[0, 1] > 0.95


def test_an_example_is_the_same_for_the_same_arguments_and_differs_by_epoch_and_seed(recipe: ScaleRecipe) -> None:
    first = recipe.example(2, 0)
    assert _same(first, recipe.example(2, 0))
    assert _same(first, pickle.loads(pickle.dumps(recipe)).example(2, 0))
    assert not _same(first, recipe.example(2, 1))
    assert not _same(first, replace(recipe, seed=1).example(2, 0))
    assert len({recipe.example(2, epoch)["target"].tobytes() for epoch in range(4)}) > 1


def test_validation_sees_the_whole_image_as_it_is(recipe: ScaleRecipe) -> None:
    row = recipe.validation_example(1)
    assert _same(row, recipe.validation_example(1))
    assert _same(row, replace(recipe, seed=7).validation_example(1))
    example = recipe.images.examples()[1][1]
    hw = recipe.config.output_hw
    assert example.hw is not None
    whole = Window(0, 0, example.hw[1], example.hw[0])
    np.testing.assert_array_equal(row["target"], window_target(example.objects, example.hw, whole, hw))
    assert row["image_id"].tolist() == [example.image_id]


def test_a_blank_has_the_shapes_of_an_example_and_counts_for_nothing(recipe: ScaleRecipe) -> None:
    rows = recipe.example(0, 0), recipe.validation_example(0), recipe.blank()
    for row in rows[1:]:
        assert {name: (values.shape, values.dtype) for name, values in row.items()} == {
            name: (values.shape, values.dtype) for name, values in rows[0].items()
        }
    torch.manual_seed(0)
    model = in_float64(recipe.build().eval())
    with torch.inference_mode():
        alone, with_blank = _batch(rows[0]), _batch(rows[0], rows[2])
        torch.testing.assert_close(recipe.loss(model, with_blank), recipe.loss(model, alone))
        found, wanted = recipe.count(model, with_blank), recipe.count(model, alone)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        assert recipe.loss(model, _batch(rows[2])) == 0


def test_the_net_learns_from_tiles_of_the_detectors_side(recipe: ScaleRecipe) -> None:
    coarse, fine = (replace(recipe, tile_side=side).validation_example(0)["image"].astype(float) for side in (16, 256))
    roughness = [np.abs(image[:, 1:] - image[:, :-1]).mean() for image in (coarse, fine)]
    assert roughness[0] < roughness[1]


def test_a_grey_picture_is_trained_on(sample: Path, tmp_path: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    grey = tmp_path / "grey.png"
    assert example.hw is not None
    Image.new("L", (example.hw[1], example.hw[0]), 90).save(grey)
    assert random_view(replace(example, uri=str(grey)), 64, np.random.default_rng(0)).pixels.shape[2] == 3


def test_a_tiff_that_is_read_by_window_is_trained_on(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    bands = np.moveaxis(np.asarray(Image.open(example.uri)), 2, 0)
    tiff = replace(example, uri=str(write_tiff(tmp_path / "a.tif", bands, photometric="rgb")))
    monkeypatch.setattr("scalenet_ray.data.rasters.WINDOWED_PIXELS", 0)
    for view in (lambda it: whole_view(it, 224), lambda it: random_view(it, 224, np.random.default_rng(4))):
        assert view(tiff).tile == view(example).tile
        # The window shrinks too little to be read reduced.
        np.testing.assert_array_equal(view(tiff).pixels, view(example).pixels)


def test_a_bad_picture_is_named(sample: Path) -> None:
    example = read_examples(str(sample), "train2017", 1)[0]
    with pytest.raises(TileError, match=r"image 1, .*000000000001\.jpg: the image must be \(5, 7\)"):
        whole_view(replace(example, hw=(5, 7)), 64)
    with pytest.raises(TileError, match=r"image 1, .*/gone\.jpg: .*there is no such file"):
        whole_view(replace(example, uri=str(sample / "gone.jpg")), 64)


def test_a_held_out_share_is_validated_on_and_not_trained_on(sample: Path) -> None:
    learned, held_out = TrainingImages(str(sample), holdout=0.25).examples()
    ids = [example.image_id for example in learned], [example.image_id for example in held_out]
    assert [len(part) for part in ids] == [6, 2]
    assert sorted(ids[0] + ids[1]) == [example.image_id for example in read_examples(str(sample), "train2017")]
    assert [example.image_id for example in TrainingImages(str(sample), holdout=0.25).examples()[1]] == ids[1]
    assert [len(part) for part in TrainingImages(str(sample), limit=2).examples()] == [2, 2]


@pytest.mark.parametrize("holdout", [-0.1, 1.0])
def test_a_holdout_that_is_no_share_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match=f"holdout must be a share of the images, .* got {holdout}"):
        TrainingImages("data", holdout=holdout)


def test_a_training_tile_is_as_large_as_the_same_tile_in_inference() -> None:
    for side in range(1, 3001):
        tile = tile_of_window(0, (side, side), Window(0, 0, side, side), 416)
        assert (tile.height, tile.width) == (416, 416)


@pytest.mark.parametrize("damaged", [[[]], [[1, 2, 3, 4]], {"size": [8, 8], "counts": [64]}, "rubbish"])
def test_a_damaged_mask_is_its_box_in_training_too(damaged: object) -> None:
    box = (16, 32, 32, 48)
    for window in (whole_image((64, 64)), Window(20, 40, 60, 50)):
        mask = object_mask(_objects(box, segmentations=(damaged,)), 0, (64, 64), window)
        np.testing.assert_array_equal(mask, object_mask(_objects(box), 0, (64, 64), window))
        assert mask.shape == (window.height, window.width)


def test_objects_without_a_segmentation_are_counted(sample: Path, tmp_path: Path) -> None:
    assert TrainingImages(str(sample)).count_boxes_alone() == 0
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        name = f"annotations/instances_{split}.json"
        document = json.loads((sample / name).read_text())
        for annotation in document["annotations"]:
            del annotation["segmentation"]
        (tmp_path / name).write_text(json.dumps(document))
    boxes = [len(example.objects.boxes) for part in TrainingImages(str(sample)).examples() for example in part]
    assert TrainingImages(str(tmp_path)).count_boxes_alone() == sum(boxes)


def test_an_empty_training_set_says_what_to_do(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image, got a limit of 0"):
        read_examples(str(sample), "train2017", 0)
    (tmp_path / "annotations").mkdir()
    empty = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(empty))
    with pytest.raises(ValueError, match="at least one image, got none"):
        read_examples(str(tmp_path), "train2017")


# --- the loss and the measures --------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss(recipe: ScaleRecipe) -> None:
    torch.manual_seed(0)
    model = recipe.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    batch = _batch(*(recipe.example(i, 0) for i in range(8)))
    losses = []
    for _ in range(4):
        losses.append(forward_backward(model, batch, recipe.loss))
        clip_and_step(model, optimizer, losses[-1], 10.0)
    assert losses[-1] < 0.9 * losses[0]


def test_class_one_weighs_double() -> None:
    assert CLASS_WEIGHTS == (1, 2, 1, 1, 1, 1)
    logits, target = torch.zeros(1, 6, 2, 2), torch.ones(1, 2, 2, dtype=torch.uint8)
    recipe = ScaleRecipe(TrainingImages("nowhere"), LIGHT)
    batch = {"image": torch.zeros(1, 2, 2, 3, dtype=torch.uint8), "target": target}
    torch.testing.assert_close(recipe.loss(_Says(logits[0]), batch), 2 * focal_loss(logits, target))


def test_the_papers_network_learns_at_the_papers_rate() -> None:
    rates = {
        name: ScaleRecipe(TrainingImages("nowhere"), PRESETS[name]).learning_rate
        for name in ("unet-vgg16", "unet-lite0")
    }
    assert rates == {"unet-vgg16": 1e-4, "unet-lite0": 2e-3}


class _Says(nn.Module):
    """A network that always gives the same logits [6, h, w]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1, -1, -1)


def test_a_perfect_map_measures_one_hundred(recipe: ScaleRecipe) -> None:
    batch = _batch(recipe.validation_example(0))
    target = batch["target"][0].long()
    says = _Says(20.0 * torch.nn.functional.one_hot(target, 6).permute(2, 0, 1))
    measured = recipe.figures(recipe.count(says, batch))
    present = sorted(set(target.flatten().tolist()))
    assert len(present) > 2
    for c in range(6):
        if c in present:
            assert measured["iou"][c] == pytest.approx(100)
            assert measured["pixel_ap"][c] == pytest.approx(100)
        else:
            assert np.isnan(measured["pixel_ap"][c])
    assert measured["pixel_ap_small"] == measured["pixel_ap"][1]
    assert measured["loss"] == pytest.approx(0, abs=1e-6)


def test_a_map_of_background_measures_nothing_found(recipe: ScaleRecipe) -> None:
    batch = _batch(recipe.validation_example(0))
    target = batch["target"][0]
    logits = torch.zeros(6, 16, 16)
    logits[0] = 5.0
    measured = recipe.figures(recipe.count(_Says(logits), batch))
    share = 100 * (target == 0).float().mean().item()
    assert measured["iou"][0] == pytest.approx(share, rel=1e-5)
    assert measured["iou"][1] == 0
    # One probability everywhere ranks nothing: the precision is that of chance.
    assert measured["pixel_ap"][1] == pytest.approx(100 * (target == 1).float().mean().item(), rel=1e-5)


def test_average_precision_is_that_of_a_ranking_worked_out_by_hand() -> None:
    # Class 1 at 0.9, 0.6 and 0.2, others at 0.7 and 0.1: precisions 1, 2/3 and 3/4.
    prob = torch.tensor([0.9, 0.6, 0.2, 0.7, 0.1])
    target = torch.tensor([1, 1, 1, 0, 0], dtype=torch.uint8)
    logits = torch.full((1, 6, 1, 5), -50.0)
    logits[0, 0, 0], logits[0, 1, 0] = (1 - prob).log(), prob.log()
    figures = pixel_figures(count_pixels(logits, target[None, None]))
    assert figures["pixel_ap_small"] == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)
    # Taken where it is above a half: two of three, and one that is not.
    assert figures["iou"][1] == pytest.approx(100 * 2 / 4)


def test_sums_of_batches_are_the_sum_of_all(recipe: ScaleRecipe) -> None:
    torch.manual_seed(0)
    model = in_float64(recipe.build().eval())
    rows = [recipe.validation_example(i) for i in range(3)]
    with torch.inference_mode():
        apart = [recipe.count(model, _batch(row)) for row in rows]
        together = recipe.count(model, _batch(*rows))
    for name, value in together.items():
        # The loss is a float32, within some ulps of 1.2e-7; all else are whole numbers, which a pixel changes by more.
        np.testing.assert_allclose(sum(part[name] for part in apart), value, rtol=1e-6, err_msg=name)


def test_ignored_pixels_are_not_measured() -> None:
    logits = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    target[0, :2] = IGNORE
    found, wanted = count_pixels(logits, target), count_pixels(logits[:, :, 2:], target[:, 2:])
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_what_is_saved_is_what_was_trained(recipe: ScaleRecipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = recipe.build()
    recipe.save(model, str(tmp_path / recipe.file_name))
    loaded, config = load_scale_net(tmp_path / recipe.file_name)
    assert config == LIGHT
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_real_annotations_make_targets(real_data: Path) -> None:
    examples = read_examples(str(real_data / "coco"), "val2017")
    by_crowd = sorted(examples, key=lambda example: -int(example.objects.crowd.sum()))[:2]
    by_number = sorted(examples, key=lambda example: len(example.objects.boxes))
    rng = np.random.default_rng(0)
    targets = [
        class_map(example, random_view(example, 64, rng), (16, 16))
        for example in [*by_crowd, by_number[0], by_number[-1]]
    ]
    assert any((target == IGNORE).any() for target in targets)
    assert not targets[2].any()
    assert (targets[3] == 1).any()
