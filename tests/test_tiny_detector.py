"""The sample's detector: targets, loss, answers, shipped weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, boxes_to_image, cut_tile, iou_matrix
from scalenet_ray.data.coco import Objects
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR_WEIGHTS
from scalenet_ray.models.weights import save_weights
from scalenet_ray.sample import train_detector
from scalenet_ray.sample.detector import (
    Answers,
    Targets,
    TinyNet,
    assign_targets,
    cell_centres,
    detection_loss,
    load_tiny_net,
    save_tiny_detector,
    tiny_detector,
)
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, make_scene, write_sample
from scalenet_ray.sample.tiny import TinyDetector, TinyNetConfig
from scalenet_ray.sample.train_detector import random_tile, train_tiny_detector
from scalenet_ray.training.examples import Example, read_examples
from tests.float64 import in_float64
from tests.job_scripts import load_job

CONFIG = TinyNetConfig((3, 7), ("cat", "dog"), input_side=64)


@pytest.fixture
def fresh() -> TinyDetector:
    torch.manual_seed(0)
    return tiny_detector(TinyNet(2), CONFIG, score_threshold=0.0)


@pytest.fixture(scope="module")
def shipped() -> TinyDetector:
    return tiny_detector(*load_tiny_net(SAMPLE_DETECTOR_WEIGHTS.partition(":")[2]))


def _tiles(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for hw in sizes]


def _found(results: list[Detections | TileError]) -> list[Detections]:
    assert all(isinstance(result, Detections) for result in results)
    return [result for result in results if isinstance(result, Detections)]


def _assign(box: tuple[float, ...], *, ignored: bool = False, side: int = 192) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the cells [cells], and the stride of those that are given to the object."""
    targets = assign_targets([torch.tensor([box])], [torch.tensor([4])], [torch.tensor([ignored])], side)
    labels = targets.labels[0].numpy()
    return labels, np.unique(cell_centres((side, side))[1].numpy()[labels == 4])


@pytest.mark.parametrize(("size", "stride"), [(16.0, 8), (47.0, 8), (48.0, 16), (111.0, 16), (112.0, 32), (190.0, 32)])
def test_an_object_is_found_on_the_level_of_its_size(size: float, stride: int) -> None:
    labels, strides = _assign((1.0, 1.0, 1.0 + size, 1.0 + size))
    assert strides.tolist() == [stride]
    assert (labels == 4).sum() >= 4


def test_small_objects_are_neither_right_nor_wrong() -> None:
    labels, strides = _assign((40.0, 40.0, 55.0, 50.0))
    assert strides.size == 0
    centres, _ = cell_centres((192, 192))
    inside = ((centres >= torch.tensor([40.0, 40.0])) & (centres <= torch.tensor([55.0, 50.0]))).all(dim=1).numpy()
    assert (labels[inside] == -2).all()
    assert (labels == -1).mean() > 0.9


def test_a_small_object_keeps_its_cells_inside_a_large_one() -> None:
    large, small = [0.0, 0.0, 50.0, 50.0], [12.0, 12.0, 38.0, 38.0]
    targets = assign_targets([torch.tensor([large, small])], [torch.tensor([0, 1])], [torch.tensor([False, False])], 64)
    centre = int(((cell_centres((64, 64))[0] - 28.0).abs().sum(dim=1)).argmin())
    assert targets.labels[0, centre] == 1
    assert targets.boxes[0, centre].tolist() == small


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    # Cell 0 holds the object and is half right in quality, cell 1 is ignored, cell 2 is background.
    quality = torch.tensor([[0.0, 5.0, 0.0]])
    classes = torch.zeros(1, 3, 2)
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0]] * 3])
    wanted = torch.tensor([[[0.0, 0.0, 4.0, 2.0]] * 3])
    loss = detection_loss(Answers(quality, classes, boxes), Targets(torch.tensor([[1, -2, -1]]), wanted))
    # IoU and GIoU are 0.5; the quality told is 0.5, so that cell 0 costs nothing there; cell 2 costs 0.5^2 ln 2.
    assert loss.item() == pytest.approx(0.25 * np.log(2) + np.log(2) + 3 * 0.5, rel=1e-4)


def test_boxes_stay_on_their_objects_when_a_tile_is_turned() -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:24, 20:52] = 255
    box = np.array([[20, 8, 52, 24]], np.float32)
    objects = Objects(box, np.array([512.0]), np.array([1]), np.array([False]), (None,))
    example = Example(1, "", (48, 64), objects)
    seen = 0
    for seed in range(30):
        tile = random_tile(np.random.default_rng(seed), pixels, example, 64)
        for x0, y0, x1, y1 in np.round(tile.boxes).astype(int):
            bright = tile.pixels[..., 0] > 127
            assert bright.sum() == pytest.approx((x1 - x0) * (y1 - y0), rel=0.15, abs=70)
            assert bright[y0:y1, x0:x1].mean() > 0.85
            seen += 1
    assert seen > 20


def test_a_batch_of_mixed_sizes_gives_what_tiles_give_alone(fresh: TinyDetector) -> None:
    in_float64(fresh.model, "model")
    tiles = _tiles((64, 64), (20, 30), (64, 48), (90, 40))
    together = _found(fresh(tiles))
    for tile, found in zip(tiles, together, strict=True):
        (alone,) = _found(fresh([tile]))
        np.testing.assert_array_equal(found.labels, alone.labels)
        # An ulp of float32, to which the answers are rounded, is at most 1.2e-7 of a value.
        np.testing.assert_allclose(found.boxes, alone.boxes, rtol=2.4e-7)
        np.testing.assert_allclose(found.scores, alone.scores, rtol=2.4e-7)


def test_one_pass_computes_all_tiles_of_a_canvas(fresh: TinyDetector) -> None:
    shapes = []
    fresh.model.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    fresh(_tiles((64, 64), (20, 30), (64, 48), (33, 40)))
    assert shapes == [(3, 3, 64, 64), (1, 3, 32, 32)]
    assert fresh.canvas_hw((64, 48)) == (64, 64)
    assert fresh.canvas_hw((20, 30)) == (32, 32)


def test_boxes_stay_inside_the_tile_and_labels_are_category_ids(fresh: TinyDetector) -> None:
    (found,) = _found(fresh(_tiles((40, 55))))
    assert 0 < len(found) <= 100
    assert found.boxes.min() >= 0
    assert found.boxes[:, [0, 2]].max() <= 55
    assert found.boxes[:, [1, 3]].max() <= 40
    assert set(found.labels.tolist()) <= {3, 7}
    assert (np.diff(found.scores) <= 0).all()


def test_a_tile_that_comes_out_as_nan_costs_that_tile_alone(fresh: TinyDetector) -> None:
    def break_second(_: torch.nn.Module, __: object, answers: Answers) -> Answers:
        boxes = answers.boxes.clone()
        boxes[1, 0, 0] = torch.nan
        return answers._replace(boxes=boxes)

    fresh.model.model.register_forward_hook(break_second)
    first, second, third = fresh(_tiles((64, 64), (64, 64), (64, 64)))
    assert isinstance(first, Detections)
    assert isinstance(second, TileError)
    assert "1 values that are NaN or infinite" in second.reason
    assert isinstance(third, Detections)


def test_weights_survive_the_file_in_half_precision(fresh: TinyDetector, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_tiny_detector(fresh.model.model, CONFIG, path)
    again = load_detector(f"tiny:{path}", score_threshold=0.2, iou_threshold=0.4)
    assert (again.input_side, again.iou_threshold) == (64, 0.4)
    assert again.categories == {3: "cat", 7: "dog"}
    default = tiny_detector(*load_tiny_net(path))
    assert default.iou_threshold == CONFIG.iou_threshold
    for name, value in default.model.state_dict().items():
        torch.testing.assert_close(value, fresh.model.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "other.safetensors")
    save_weights({"w": torch.zeros(2)}, {}, path)
    with pytest.raises(ValueError, match="must have 'tiny_detector' in its header"):
        load_tiny_net(path)


def test_batch_normalisation_is_frozen(shipped: TinyDetector) -> None:
    before = {name: value.clone() for name, value in shipped.model.state_dict().items()}
    shipped(_tiles((192, 144)))
    assert not shipped.model.training
    assert all(torch.equal(value, before[name]) for name, value in shipped.model.state_dict().items())


def test_training_lowers_the_loss_and_the_seed_fixes_it(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample", train=8, val=0)
    examples = read_examples(str(sample), "train2017")
    config = TinyNetConfig(tuple(SAMPLE_CATEGORIES), tuple(SAMPLE_CATEGORIES.values()), input_side=96)

    def losses(seed: int) -> list[float]:
        rows: list[dict] = []
        train_tiny_detector(examples, config, epochs=3, batch_size=4, learning_rate=2e-3, seed=seed, report=rows.append)
        return [row["loss"] for row in rows]

    first = losses(0)
    assert first[-1] < first[0]
    assert first == losses(0)
    assert first != losses(1)


def test_a_nan_loss_stops_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = write_sample(tmp_path / "sample", train=2, val=0)
    examples = read_examples(str(sample), "train2017")
    config = TinyNetConfig(tuple(SAMPLE_CATEGORIES), tuple(SAMPLE_CATEGORIES.values()), input_side=64)
    broken = torch.tensor(torch.nan, requires_grad=True)
    monkeypatch.setattr(train_detector, "detection_loss", lambda answers, targets: broken)
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 1 \(images (1, 2|2, 1)\)"):
        train_tiny_detector(examples, config, epochs=1, batch_size=2, learning_rate=1e-3)


def test_the_job_writes_weights_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load_job("train_tiny_detector")
    monkeypatch.setattr(module, "ensure_sample", lambda folder: write_sample(folder, train=2, val=0))
    job = module.TrainTinyDetector(data=str(tmp_path / "sample"), output=str(tmp_path / "run"), epochs=1, batch_size=2)
    assert module.main(job) == 0
    detector = load_detector(f"tiny:{tmp_path}/run/detector.safetensors")
    assert detector.categories == SAMPLE_CATEGORIES
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_images"] == 2
    assert "1 epochs done" in capsys.readouterr().out


def test_the_shipped_detector_is_small_and_knows_the_samples_categories(shipped: TinyDetector) -> None:
    assert sum(p.numel() for p in shipped.model.parameters()) < 1_000_000
    assert shipped.categories == SAMPLE_CATEGORIES
    assert shipped.input_side == 192


def _recall(shipped: TinyDetector, smallest: float, largest: float, share: float) -> float:
    """Share of objects with sides in [smallest, largest) found in windows of `share` of a scene's sides round them."""
    hits = []
    for seed in range(12):
        scene = make_scene(np.random.default_rng([77, seed]))
        hw = (scene.pixels.shape[0], scene.pixels.shape[1])
        for mask, category_id in zip(scene.masks, scene.category_ids, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], np.float64)
            if not smallest <= max(box[0, 2] - box[0, 0], box[0, 3] - box[0, 1]) < largest:
                continue
            height, width = round(hw[0] * share), round(hw[1] * share)
            x0 = int(np.clip(columns.mean() - width / 2, 0, hw[1] - width))
            y0 = int(np.clip(rows.mean() - height / 2, 0, hw[0] - height))
            ratio = 192 / max(height, width)
            window = Window(x0, y0, x0 + width, y0 + height)
            tile = Tile(1, (), hw, window, int(height * ratio), int(width * ratio))
            (found,) = _found(shipped([cut_tile(scene.pixels, tile)]))
            found = found[(found.scores > 0.2) & (found.labels == category_id)]
            hits.append((iou_matrix(box, boxes_to_image(found.boxes, tile))[0] > 0.5).any() if len(found) else False)
    assert len(hits) > 5
    return float(np.mean(hits))


def test_the_shipped_detector_finds_small_objects_when_it_zooms(shipped: TinyDetector) -> None:
    whole, zoomed = _recall(shipped, 14, 30, 1.0), _recall(shipped, 14, 30, 0.5)
    assert zoomed > 0.3
    assert zoomed > 2 * whole
