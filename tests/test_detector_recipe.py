"""Fine-tuning a detector: its windows, rows, losses and files, and the job on Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, boxes_to_image
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import save_detector
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, write_sample
from scalenet_ray.training.detector_recipe import (
    DetectorRecipe,
    boxes_in_tile,
    plan_fine_tuning,
    small_objects,
    zoom_window,
)
from scalenet_ray.training.examples import TrainingImages
from scalenet_ray.training.recipe import Batch, Row
from tests.job_scripts import load_job
from tests.oracles import detections
from tests.test_datasets import sample_as_yolo
from tests.test_torchvision_detectors import CATEGORIES, assert_same, lively_model, make_tiles

SMALL_RCNN, SMALL_SSD = "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"
HW = (48, 64)


def write_data(
    folder: Path, annotations: list[dict], categories: dict[int, str], hw: tuple[int, int] = HW
) -> TrainingImages:
    """One black picture in both splits, with a white rectangle for each annotation, {"bbox", "category_id"}."""
    pixels = np.zeros((*hw, 3), np.uint8)
    for row in annotations:
        x, y, width, height = row["bbox"]
        pixels[y : y + height, x : x + width] = 255
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        Image.fromarray(pixels).save(folder / split / "1.png")
        document = {
            "images": [{"id": 1, "file_name": "1.png", "height": hw[0], "width": hw[1]}],
            "annotations": [{"id": i, "image_id": 1, "iscrowd": 0} | row for i, row in enumerate(annotations, start=1)],
            "categories": [{"id": key, "name": name} for key, name in categories.items()],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return TrainingImages(str(folder))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    return TrainingImages(str(write_sample(tmp_path_factory.mktemp("tuned") / "sample", train=6, val=2)))


@pytest.fixture(scope="module")
def recipe(sample: TrainingImages) -> DetectorRecipe:
    return plan_fine_tuning(sample, f"untrained:{SMALL_RCNN}", input_side=64)


def batch_of(*rows: Row) -> Batch:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def objects_of_boxes(*boxes: tuple[float, ...], crowd: bool = False) -> Objects:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    areas = np.prod(array[:, 2:] - array[:, :2], axis=1).astype(np.float64)
    count = len(array)
    return Objects(array, areas, np.arange(1, count + 1), np.full(count, crowd), (None,) * count)


# --- windows and their boxes ------------------------------------------------------------------------


def test_windows_hold_a_small_object_more_often_than_not() -> None:
    # One small object, and one of class 2.
    objects = objects_of_boxes((352.5, 20.25, 360, 30), (10, 150, 90, 210))
    rng = np.random.default_rng(0)
    windows = [zoom_window(rng, (300, 400), objects) for _ in range(400)]
    holding = [w for w in windows if w.x0 <= 352.5 and w.x1 >= 360 and w.y0 <= 20.25 and w.y1 >= 30]
    anywhere = [zoom_window(rng, (300, 400), objects_of_boxes()) for _ in range(400)]
    assert small_objects(objects, (300, 400)).tolist() == [0]
    assert 0.7 < len(holding) / 400 < 0.9
    for window in windows + anywhere:
        assert window.width == window.height
        assert 100 <= window.width <= 200
        assert window.x1 <= 400
        assert window.y1 <= 300
    assert len({window.xyxy for window in holding}) > 250
    assert {0, 1} == {int(window.x0 > 150) for window in anywhere}


def test_a_window_of_a_narrow_image_is_as_wide_as_it_allows() -> None:
    window = zoom_window(np.random.default_rng(0), (400, 60), objects_of_boxes())
    assert window.width == 60
    assert 100 <= window.height <= 200


def test_a_small_object_that_is_longer_than_its_window_fills_it() -> None:
    objects = objects_of_boxes((0, 100, 400, 102))
    assert small_objects(objects, (300, 400)).tolist() == [0]
    rng = np.random.default_rng(0)
    windows = [zoom_window(rng, (300, 400), objects) for _ in range(200)]
    assert np.mean([window.y0 <= 100 and window.y1 >= 102 for window in windows]) > 0.7


def test_crowds_are_no_small_objects() -> None:
    assert not len(small_objects(objects_of_boxes((0, 0, 4, 4), crowd=True), (300, 400)))


def test_boxes_in_a_tile_carry_back_to_the_image() -> None:
    boxes = ((10.5, 4, 20, 12.25), (12, 2, 36, 22), (14, 10, 15, 11))
    objects = objects_of_boxes(*boxes)
    tile = Tile(1, (), HW, Window(8, 0, 32, 24), 97, 96)
    found, labels = boxes_in_tile(objects, tile)
    assert labels.tolist() == [1, 2, 3]
    # The second reaches over the window's right edge.
    np.testing.assert_allclose(boxes_to_image(found, tile), np.minimum(boxes, [32, 24, 32, 24]), atol=1e-4)


def test_what_is_hidden_too_thin_or_a_crowd_is_not_learned() -> None:
    tile = Tile(1, (), HW, Window(0, 0, 32, 32), 32, 32)
    boxes = ((20, 0, 40, 10), (21, 0, 45, 10), (4, 4, 4.5, 20), (40, 4, 50, 20), (5, 5, 5, 9))
    assert boxes_in_tile(objects_of_boxes(*boxes), tile)[1].tolist() == [1]
    assert not len(boxes_in_tile(objects_of_boxes(*boxes, crowd=True), tile)[1])
    empty, _ = boxes_in_tile(objects_of_boxes(), tile)
    assert empty.shape == (0, 4)


# --- rows -------------------------------------------------------------------------------------------


def test_rows_have_fixed_shapes_and_are_drawn_anew_each_epoch(recipe: DetectorRecipe) -> None:
    rows = [recipe.example(i, epoch) for i in range(6) for epoch in range(4)]
    shapes = {name: (values.shape, values.dtype) for name, values in recipe.blank().items()}
    for row in rows + [recipe.validation_example(i) for i in range(4)]:
        assert {name: (values.shape, values.dtype) for name, values in row.items()} == shapes
    assert rows[0]["image"].shape == (64, 64, 3)
    assert len({row["image"].tobytes() for row in rows}) == len(rows)
    assert {int(row["zoomed"]) for row in rows} == {0, 1}
    again = recipe.example(1, 2)
    assert all(np.array_equal(again[name], rows[6][name]) for name in again)


def test_boxes_lie_on_their_objects_and_have_the_detectors_classes(tmp_path: Path) -> None:
    annotations = [{"bbox": [20, 8, 5, 4], "category_id": 7}, {"bbox": [40, 30, 6, 6], "category_id": 3}]
    images = write_data(tmp_path / "data", annotations, {7: "Cat", 3: "dog"})
    path = str(tmp_path / "net.safetensors")
    save_detector(build_detector(SMALL_RCNN, 4), SMALL_RCNN, {1: "dog", 2: "bird", 3: "cat"}, path)
    recipe = plan_fine_tuning(images, f"torchvision:{path}", input_side=128)
    assert recipe.classes == {7: 3, 3: 1}
    seen = []
    for epoch in range(30):
        row = recipe.example(0, epoch)
        height, width = row["hw"]
        assert not row["image"][height:].any()
        assert not row["image"][:, width:].any()
        for box, label in zip(row["boxes"][: row["count"]], row["labels"], strict=False):
            x0, y0, x1, y1 = np.round(box).astype(int)
            white = row["image"][y0:y1, x0:x1].mean()
            # Bilinear edges are grey.
            assert white > 190
            seen.append((int(row["zoomed"]), int(label)))
        assert row["zoomed"] or row["count"] == 2
    assert set(seen) == {(0, 1), (0, 3), (1, 1), (1, 3)}


def test_validation_sees_each_image_whole_and_one_window_of_it(recipe: DetectorRecipe) -> None:
    assert recipe.sizes() == (6, 4)
    rows = [recipe.validation_example(i) for i in range(4)]
    assert [int(row["zoomed"]) for row in rows] == [0, 1, 0, 1]
    assert [int(row["image_id"]) for row in rows] == [1_000_001, 1_000_001, 1_000_002, 1_000_002]
    other = replace(recipe, seed=5)
    assert all(np.array_equal(other.validation_example(i)["image"], rows[i]["image"]) for i in range(4))
    assert not np.array_equal(other.example(0, 0)["image"], recipe.example(0, 0)["image"])


def test_a_picture_that_is_lost_is_named(tmp_path: Path) -> None:
    images = write_data(tmp_path, [{"bbox": [1, 1, 5, 5], "category_id": 1}], {1: "cat"})
    recipe = plan_fine_tuning(images, f"untrained:{SMALL_RCNN}", input_side=64)
    (tmp_path / "train2017" / "1.png").write_bytes(b"")
    with pytest.raises(TileError, match=r"image 1, .*1\.png: .* an empty file"):
        recipe.example(0, 0)


# --- the network, its losses and its file -----------------------------------------------------------


def seeded_loss(recipe: DetectorRecipe, model: nn.Module, batch: Batch) -> torch.Tensor:
    torch.manual_seed(0)
    return recipe.loss(model, batch)


def frozen_rcnn(recipe: DetectorRecipe) -> nn.Module:
    """Without norms that learn, so that rows of a batch do not see each other."""
    torch.manual_seed(0)
    model = recipe.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_blanks_cost_nothing(recipe: DetectorRecipe) -> None:
    model = frozen_rcnn(recipe)
    rows, blank = [recipe.example(i, 0) for i in range(2)], recipe.blank()
    alone = seeded_loss(recipe, model, batch_of(*rows))
    assert float(alone.detach()) > 0
    torch.testing.assert_close(seeded_loss(recipe, model, batch_of(rows[0], blank, rows[1], blank)), alone)
    nothing = seeded_loss(recipe, model, batch_of(blank, blank))
    nothing.backward()
    assert nothing.item() == 0
    assert not any(values.any() for values in recipe.count(model, batch_of(blank, blank)).values())
    # Other workers wait for gradients from this one.
    assert all(values.grad is not None and not values.grad.any() for values in model.parameters())


@pytest.mark.parametrize("name", [SMALL_RCNN, SMALL_SSD, "fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_every_weight_has_a_gradient_where_a_batch_has_no_box(sample: TrainingImages, name: str) -> None:
    torch.manual_seed(0)
    recipe = plan_fine_tuning(sample, f"untrained:{name}", input_side=64)
    model, batch = recipe.build(), batch_of(recipe.example(0, 0), recipe.example(1, 0))
    recipe.loss(model, batch | {"count": torch.zeros_like(batch["count"])}).backward()
    # Or many workers would have to look for the ones without, each step.
    assert [key for key, values in model.named_parameters() if values.grad is None] == []


def test_a_few_steps_lower_the_loss(recipe: DetectorRecipe) -> None:
    torch.manual_seed(0)
    model, batch = recipe.build(), batch_of(*(recipe.example(i, 0) for i in range(2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    losses = []
    for _ in range(6):
        loss = seeded_loss(recipe, model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_tiles_are_not_resized(recipe: DetectorRecipe) -> None:
    model, row = frozen_rcnn(recipe), recipe.validation_example(0)
    seen: list[torch.Tensor] = []
    model.get_submodule("backbone").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    recipe.loss(model, batch_of(row))
    height, width = row["hw"]
    mean, deviation = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = seen[0][0].permute(1, 2, 0).numpy()
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(
        pixels[:height, :width] * deviation + mean, row["image"][:height, :width] / 255, atol=1e-5
    )
    assert not pixels[height:].any()
    assert not pixels[:, width:].any()


def test_validation_is_the_same_whatever_the_batches(recipe: DetectorRecipe) -> None:
    torch.manual_seed(0)
    model = recipe.build()
    rows = [recipe.validation_example(i) for i in range(4)]
    before = {key: values.clone() for key, values in model.state_dict().items()}
    with torch.inference_mode():
        together = recipe.count(model, batch_of(*rows))
        torch.manual_seed(9)
        alone = [recipe.count(model, batch_of(row, recipe.blank())) for row in rows]
    assert together["images"].tolist() == [2, 2]
    for name in together:
        np.testing.assert_allclose(np.sum([part[name] for part in alone], axis=0), together[name], rtol=1e-6)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    figures = recipe.figures(together)
    assert figures["loss"] == pytest.approx((figures["loss_whole"] + figures["loss_windows"]) / 2)
    assert figures["fit"] == pytest.approx(1 / (1 + figures["loss"]))
    assert np.isnan(recipe.figures({"loss": np.zeros(2), "images": np.zeros(2)})["fit"])


@pytest.mark.parametrize("name", [SMALL_RCNN, SMALL_SSD])
def test_a_detector_is_saved_as_it_was_loaded_and_its_norms_stay(tmp_path: Path, name: str) -> None:
    images = write_data(tmp_path / "data", [{"bbox": [20, 8, 9, 9], "category_id": 5}], {5: "cat"})
    start, saved, tuned = (str(tmp_path / f"{part}.safetensors") for part in ("start", "saved", "tuned"))
    save_detector(lively_model(name), name, CATEGORIES, start)
    recipe = plan_fine_tuning(images, f"torchvision:{start}", input_side=64)
    assert recipe.learning_rate == 1e-4
    model = recipe.build()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    recipe.save(model, saved)
    tiles = make_tiles((64, 64), (40, 64))
    expected = detections(load_detector(f"torchvision:{start}")(tiles))
    loaded = load_detector(f"torchvision:{saved}")
    assert loaded.categories == CATEGORIES
    assert sum(map(len, expected)) > 1
    for one, other in zip(detections(loaded(tiles)), expected, strict=True):
        assert_same(one, other)

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    recipe.loss(model, batch_of(recipe.validation_example(0), recipe.validation_example(1))).backward()
    optimizer.step()
    assert len(norms) > 10
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    recipe.save(model, tuned)
    found = detections(load_detector(f"torchvision:{tuned}")(tiles))
    assert not np.array_equal(found[0].scores, expected[0].scores)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start", ["yolox-onnx:yolox.onnx", "tiny:x.safetensors", "torchvision:", "fasterrcnn", "my:Net"]
)
def test_what_cannot_be_trained_is_refused(sample: TrainingImages, start: str) -> None:
    with pytest.raises(ValueError, match=f"must be torchvision:NAME, .* got '{start}': .*ONNX files, can't be trained"):
        plan_fine_tuning(sample, start)


def test_detectors_of_masks_are_refused(sample: TrainingImages) -> None:
    with pytest.raises(ValueError, match=r"maskrcnn_resnet50_fpn learns masks too, .*: fine-tune a Faster R-CNN"):
        plan_fine_tuning(sample, "untrained:maskrcnn_resnet50_fpn")


def test_a_category_that_the_detector_lacks_is_named(tmp_path: Path) -> None:
    images = write_data(tmp_path / "data", [{"bbox": [1, 1, 5, 5], "category_id": 9}], {5: "cat", 9: "zebra"})
    path = str(tmp_path / "net.safetensors")
    save_detector(build_detector(SMALL_RCNN, 3), SMALL_RCNN, CATEGORIES, path)
    with pytest.raises(ValueError, match="know every category of the data set, got no zebra among its cat, dog"):
        plan_fine_tuning(images, f"torchvision:{path}")


def test_images_without_any_object_are_nothing_to_learn_from(tmp_path: Path) -> None:
    images = write_data(tmp_path, [], {1: "cat"})
    with pytest.raises(ValueError, match="fine-tuning wants objects, got 2 images without any"):
        plan_fine_tuning(images, f"untrained:{SMALL_RCNN}")


def test_splits_of_other_categories_are_refused(tmp_path: Path) -> None:
    images = write_data(tmp_path, [{"bbox": [1, 1, 5, 5], "category_id": 1}], {1: "cat"})
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"cat"', '"dog"'))
    with pytest.raises(ValueError, match="train2017 and val2017 must have the same categories"):
        plan_fine_tuning(images, f"untrained:{SMALL_RCNN}")
    plan_fine_tuning(replace(images, holdout=0.4), f"untrained:{SMALL_RCNN}")


def test_a_tile_too_small_to_see_anything_is_refused(sample: TrainingImages) -> None:
    with pytest.raises(ValueError, match="input_side must be 32 tile pixels or more, got 8"):
        plan_fine_tuning(sample, f"untrained:{SMALL_RCNN}", input_side=8)


# --- the job ----------------------------------------------------------------------------------------


def job_on(data: str | None, output: Path, **changes: Any) -> Any:
    module = load_job("finetune_detector")
    training = module.Training(epochs=2, batch_size=4, workers=2, seed=3)
    job = module.FinetuneDetector(
        data=data, detector=f"untrained:{SMALL_RCNN}", input_side=64, output=str(output), training=training
    )
    return replace(job, **changes)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_job_fine_tunes_and_goes_on_where_it_stopped(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_job("finetune_detector").main
    data = sample_as_yolo(write_sample(tmp_path / "sample", train=6, val=2), tmp_path / "yolo")
    output = tmp_path / "run"
    job = job_on(data, output, split="train", val_split="val")
    assert main(replace(job, training=replace(job.training, epochs=1))) == 0
    with pytest.raises(FileExistsError, match="add --resume to go on"):
        main(job)
    # As if two had been asked for, and the run had been stopped after one.
    config = output / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1", "epochs: 2"))
    first = (output / "detector.safetensors").read_bytes()
    assert main(replace(job, resume=True)) == 0

    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["val_images"], metrics["failed"]) == (6, 2, [])
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert all(0 < row["val"]["fit"] < 1 for row in metrics["epochs"])
    # Ray's own lines may stand between.
    lines = [line for line in capsys.readouterr().out.splitlines() if line.partition(":")[0].find("epoch") in (0, 2)]
    assert [line.partition(":")[0] for line in lines] == [
        "epoch 1/1",
        "1 epochs done",
        "epoch 2/2",
        "2 epochs done",
    ]
    assert (output / "detector.safetensors").read_bytes() != first
    detector = load_detector(lines[-1].partition("--detector ")[2])
    assert sorted(detector.categories.values()) == sorted(SAMPLE_CATEGORIES.values())
    assert len(detector(make_tiles((64, 64)))) == 1
