"""`ultralytics:PATH` with random weights: Ultralytics' own boxes and masks, batches, frames."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.data.images import read_image
from scalenet_ray.models.class_names import COCO_CATEGORIES
from scalenet_ray.models.detector_check import whole_tile
from scalenet_ray.models.detectors import load_detector
from tests.devices import DEVICES
from tests.oracles import detections
from tests.test_torchvision_detectors import assert_same, make_tiles

pytest.importorskip("ultralytics", reason="needs the extra ultralytics: pip install -e '.[ultralytics]'")

from scalenet_ray.models.ultralytics_detector import UltralyticsDetector, import_ultralytics
from tests.float64 import in_float64
from tests.ultralytics_models import KINDS, NAMES, SIDE, build, save, trained

MASKS = ("yolo11n-seg", "yolo26n-seg")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> its file."""
    folder = tmp_path_factory.mktemp("ultralytics")
    return {kind: save(folder / f"{kind}.pt", build(kind)) for kind in KINDS}


def loaded(path: str, **settings: Any) -> Any:
    return load_detector(f"ultralytics:{path}", **settings)


def exact(kind: str, **settings: Any) -> UltralyticsDetector:
    """A detector whose boxes do not depend on how a CPU rounds."""
    detector = UltralyticsDetector(build(kind), input_side=SIDE, **settings)
    in_float64(detector.model)
    return detector


def assert_matched(found: Detections, wanted: np.ndarray) -> None:
    """As many detections as [N, 6] rows of xyxy, score, class, each near one: 0.01 pixels, 1e-4 of a score."""
    rows = np.column_stack([found.boxes, 100 * found.scores, 1e4 * found.labels]).astype(np.float64)
    others = wanted * [1, 1, 1, 1, 100, 1e4]
    distances = np.abs(rows[:, None] - others[None]).max(axis=2)
    assert len(found) == len(wanted)
    assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_ultralytics_own_on_a_tile_of_the_networks_size(
    kind: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import RTDETR, YOLO

    monkeypatch.chdir(tmp_path)
    (tile,) = make_tiles((SIDE, SIDE))
    model = (RTDETR if kind == "rt-detr" else YOLO)(files[kind])
    # Without suppression, which of two boxes that nearly tie is kept would depend on rounding.
    settings = {"imgsz": SIDE, "conf": 0.3, "iou": 1.0, "max_det": 10_000, "verbose": False}
    (own,) = model.predict(np.ascontiguousarray(tile[..., ::-1]), **settings)
    wanted = own.boxes.data.numpy().astype(np.float64)
    inside = (wanted[:, 2:4] > wanted[:, :2]).all(axis=1)
    (found,) = detections(loaded(files[kind], score_threshold=0.3, iou_threshold=1.0)([tile]))
    assert len(found) > 8
    assert_matched(found, wanted[inside])


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_ultralytics_own(
    kind: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    (tile,) = make_tiles((SIDE, SIDE))
    settings = {"imgsz": SIDE, "conf": 0.3, "iou": 1.0, "max_det": 10_000, "verbose": False}
    (own,) = YOLO(files[kind]).predict(np.ascontiguousarray(tile[..., ::-1]), **settings)
    (found,) = detections(loaded(files[kind], score_threshold=0.3, iou_threshold=1.0)([tile]))
    assert found.masks is not None
    pixels = [coco_mask.decode({"size": [SIDE, SIDE], "counts": counts}).astype(bool) for counts in found.masks]
    theirs = own.masks.data.numpy().astype(bool)
    ours = np.column_stack([found.boxes, 100 * found.scores])
    distances = np.abs(ours[:, None] - own.boxes.data.numpy()[None, :, :5] * [1, 1, 1, 1, 100]).max(axis=2)
    assert len(pixels) == len(theirs) > 8
    for mask, near in zip(pixels, distances < 0.01, strict=True):
        assert min((mask ^ other).mean() for other in theirs[near]) < 1e-3


@pytest.mark.parametrize("kind", ["yolo11n", "yolo26n-seg", "rt-detr"])
def test_tiles_of_one_canvas_are_one_call_and_equal_one_by_one(kind: str) -> None:
    detector = exact(kind)
    tiles = make_tiles((64, 64), (40, 64), (96, 96), (1, 1), (64, 33))
    alone = [detections(detector([tile]))[0] for tile in tiles]
    seen: list[torch.Tensor] = []
    detector.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    together = detections(detector(tiles))
    assert [len(batch) for batch in seen] == ([5] if kind == "rt-detr" else [3, 1, 1])
    assert sum(map(len, alone)) > 8
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["yolo11n-seg", "yolo26n", "rt-detr"])
def test_a_network_finds_on_a_gpu_what_it_finds_on_the_cpu(kind: str, device: str) -> None:
    tiles = make_tiles((64, 64), (40, 64))
    # Of boxes that nearly tie, which is suppressed depends on rounding.
    loose = {"score_threshold": 0.3, "iou_threshold": 1.0}
    expected, found = (detections(exact(kind, device=where, **loose)(tiles)) for where in ("cpu", device))
    for one, other in zip(found, expected, strict=True):
        assert len(one)
        assert_matched(one, np.column_stack([other.boxes, other.scores, other.labels]))


def test_a_network_sees_tiles_at_their_own_size_padded_with_grey() -> None:
    detector = UltralyticsDetector(build("yolov8n"))
    seen: list[torch.Tensor] = []
    detector.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    tiles = make_tiles((64, 40), (33, 64))
    detector(tiles)
    (batch,) = seen
    assert tuple(batch.shape) == (2, 3, 64, 64)
    pixels = (batch * 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pixels[0, :, :40], tiles[0], atol=1e-3)
    np.testing.assert_allclose(pixels[1, :33], tiles[1], atol=1e-3)
    np.testing.assert_allclose(pixels[1, 33:], 114, atol=1e-3)


def test_a_yolos_canvases_are_rectangles_and_rt_detrs_are_squares_of_its_own_size(files: dict[str, str]) -> None:
    yolo, detr = loaded(files["yolo11n"]), loaded(files["rt-detr"])
    sizes = ((64, 20), (1, 64), (400, 300))
    assert [yolo.canvas_hw(hw) for hw in sizes] == [(64, 32), (32, 64), (416, 320)]
    assert [detr.canvas_hw(hw) for hw in sizes] == [(128, 128), (128, 128), (416, 416)]
    assert yolo.input_side == detr.input_side == SIDE


def test_a_network_of_four_strides_has_canvases_of_the_coarsest() -> None:
    from ultralytics.nn.tasks import DetectionModel

    detector = UltralyticsDetector(DetectionModel("yolov8n-p6.yaml", nc=3, verbose=False))
    assert detector.canvas_hw((65, 30)) == (128, 64)


@pytest.mark.parametrize("kind", ["yolo11n", "yolo11n-seg", "rt-detr"])
def test_boxes_and_masks_stay_inside_their_tile_and_not_only_its_canvas(kind: str) -> None:
    detector = UltralyticsDetector(build(kind), input_side=SIDE)
    sizes = [(40, 64), (64, 20)]
    for found, (height, width) in zip(detections(detector(make_tiles(*sizes))), sizes, strict=True):
        assert len(found)
        assert found.boxes.min() >= 0
        assert (found.boxes <= [width, height, width, height]).all()
        assert (found.areas > 0).all()
        if kind == "yolo11n-seg":
            assert found.masks is not None
            shapes = [coco_mask.decode({"size": [height, width], "counts": counts}).any() for counts in found.masks]
            assert all(shapes)


class Answers(nn.Module):
    """A head that answers with given columns, cxcywh and a score for each class."""

    def __init__(self, columns: torch.Tensor) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.columns.expand(len(pixels), *self.columns.shape), None


def answering(detector: UltralyticsDetector, rows: list[list[float]]) -> UltralyticsDetector:
    detector.model = Answers(torch.tensor(rows).T)
    return detector


OVERLAPPING = [
    [20.0, 20, 20, 20, 0.9, 0.2, 0.0],
    [21.0, 20, 20, 20, 0.8, 0.1, 0.0],
    [20.0, 20, 20, 20, 0.1, 0.7, 0.0],
    [50.0, 50, 10, 10, 0.0, 0.0, 0.005],
]


def test_boxes_are_suppressed_within_their_class_alone() -> None:
    (tile,) = make_tiles((64, 64))
    (found,) = detections(answering(UltralyticsDetector(build("yolov8n")), OVERLAPPING)([tile]))
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.scores, [0.9, 0.7])
    np.testing.assert_allclose(found.boxes, [[10, 10, 30, 30]] * 2)


def test_both_thresholds_reach_it() -> None:
    (tile,) = make_tiles((64, 64))
    loose = UltralyticsDetector(build("yolov8n"), score_threshold=0.001, iou_threshold=0.95)
    assert [len(found) for found in detections(answering(loose, OVERLAPPING)([tile]))] == [4]
    strict = UltralyticsDetector(build("yolov8n"), score_threshold=0.75, iou_threshold=0.95)
    assert [len(found) for found in detections(answering(strict, OVERLAPPING)([tile]))] == [2]


@pytest.mark.parametrize("kind", ["yolo11n", "yolo11n-seg", "rt-detr"])
def test_a_tile_with_nan_fails_alone(kind: str) -> None:
    detector = UltralyticsDetector(build(kind), input_side=SIDE)

    def poison(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first = output[0][0] if kind == "yolo11n-seg" else output[0]
        first[1] = float("nan")
        return output

    detector.model.register_forward_hook(poison)
    good, bad = detector(make_tiles((64, 64), (64, 60)))
    assert isinstance(good, Detections)
    assert isinstance(bad, TileError)
    assert "NaN or infinite" in bad.reason


@pytest.mark.parametrize("kind", ["yolo26n", "yolo11n-seg", "rt-detr"])
def test_mixed_precision_computes_in_bfloat16_and_answers_in_float32(kind: str, files: dict[str, str]) -> None:
    detector = loaded(files[kind], mixed_precision=True)
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    in_head = set(detector.model.model[-1].modules())
    for module in detector.model.modules():
        if isinstance(module, nn.Conv2d):
            of_head = module in in_head
            module.register_forward_hook(lambda _module, _inputs, output, at=of_head: seen[at].add(output.dtype))
    (found,) = detections(detector(make_tiles((64, 64))))
    # The head computes the boxes: bfloat16 has 8 bits for a coordinate.
    assert seen == {True: {torch.float32}, False: {torch.bfloat16}}
    assert found.boxes.dtype == found.scores.dtype == np.float32


def test_a_file_in_s3_is_loaded(files: dict[str, str], s3_bucket: str) -> None:
    from scalenet_ray.data.storage import write_bytes_atomic

    write_bytes_atomic(f"{s3_bucket}/net.pt", Path(files["yolo11n"]).read_bytes())
    assert loaded(f"{s3_bucket}/net.pt").categories == NAMES


def test_trained_weights_find_what_their_export_finds(real_data: Path, tmp_path: Path) -> None:
    export = real_data / "models" / "yolo11n.onnx"
    paths = sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:3]
    tiles = [whole_tile(read_image(path), 640) for path in paths]
    ours, exported = loaded(save(tmp_path / "net.pt", trained(export))), load_detector(f"onnx:{export}")
    position = {category_id: index for index, category_id in enumerate(sorted(COCO_CATEGORIES))}
    for found, wanted in zip(detections(ours(tiles)), detections(exported(tiles)), strict=True):
        # Near the threshold and near ties rounding decides.
        sure = found[found.scores >= 0.1]
        rows = np.column_stack([wanted.boxes, wanted.scores, [position[label] for label in wanted.labels.tolist()]])
        assert len(sure) >= 1
        assert_matched(sure, rows[rows[:, 4] >= 0.1])


def test_an_end_to_end_head_is_not_suppressed() -> None:
    model = build("yolo26n")
    model.end2end = True
    detector = UltralyticsDetector(model, score_threshold=0.3)
    (found,) = detections(detector(make_tiles((64, 64))))
    assert detector.description == "YOLO of Ultralytics, without NMS"
    assert len(found) > 8


def test_the_import_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        import_ultralytics("ultralytics.utils")
        assert cv2.getNumThreads() == 3
        assert "OMP_NUM_THREADS" not in os.environ
    finally:
        cv2.setNumThreads(threads)
