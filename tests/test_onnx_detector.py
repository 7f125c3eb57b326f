"""`onnx:PATH`: each kind of export is recognised, and finds what is in the picture."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from scalenet_ray.commands.check import CheckInputs, main
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.models.class_names import COCO_CATEGORIES
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.onnx_detector import OnnxDetector
from scalenet_ray.models.spec import NetworkSpec
from tests.colour_exports import KINDS, ColourNet, export, noisy_tile, seen_in
from tests.oracles import detections
from tests.test_yolox import black

SUPPORTED = sorted(KINDS.keys() - {"yolox-decoded"})
SEVERAL_CLASSES = ("queries", "rtdetr-rows")
SIZES = [(96, 160), (64, 128), (40, 72), (96, 160), (128, 64), (8, 8)]


def load(path: str | Path, **settings: Any) -> OnnxDetector:
    detector = load_detector(f"onnx:{path}", **settings)
    assert isinstance(detector, OnnxDetector)
    return detector


def in_order(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same, by place and label: equal scores have no order."""
    order = np.lexsort((labels, *np.round(boxes[:, :2]).T))
    return boxes[order], scores[order], labels[order]


def assert_sees(found: Detections | TileError, tile: np.ndarray, kind: str) -> None:
    assert isinstance(found, Detections), found
    boxes, scores, classes = seen_in(tile, every_class=kind in SEVERAL_CLASSES)
    labels = np.array(sorted(COCO_CATEGORIES))[classes]
    got = in_order(found.boxes, found.scores, found.labels)
    for one, other in zip(got, in_order(boxes, scores, labels), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def count_calls(detector: OnnxDetector, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False) -> list[tuple[int, ...]]:
    """The shapes of the batches that the session is given from now on; it may say that it is on a GPU."""
    session = detector._network.session
    shapes: list[tuple[int, ...]] = []
    run = session.run

    def counted(names: Any, feed: dict[str, np.ndarray], options: Any) -> Any:
        shapes.append(feed["images"].shape)
        return run(names, feed, options)

    monkeypatch.setattr(session, "run", counted)
    if gpu:
        monkeypatch.setattr(session, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    return shapes


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each kind, with free axes."""
    folder = tmp_path_factory.mktemp("exports")
    return {kind: export(folder / f"{kind}.onnx", kind) for kind in KINDS}


# --- what is found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_batch_of_mixed_sizes_equals_one_by_one(
    exports: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    tiles = [noisy_tile(hw, seed) for seed, hw in enumerate(SIZES)]
    detector = load(exports[kind])
    shapes = count_calls(detector, monkeypatch, gpu=gpu)
    together = detections(detector(tiles))
    assert len(shapes) == (len({detector.canvas_hw(hw) for hw in SIZES}) if gpu and kind != "torchvision" else 6)
    alone = [detections(detector([tile]))[0] for tile in tiles]
    assert sum(map(len, alone)) > 20
    for one, other, tile in zip(alone, together, tiles, strict=True):
        assert_sees(one, tile, kind)
        assert_sees(other, tile, kind)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind != "yolox"])
def test_a_fixed_export_keeps_its_canvas_and_batches(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load(export(tmp_path / "net.onnx", kind, free=()))
    assert detector.canvas_hw((8, 8)) == (96, 160)
    assert detector.input_side == 96
    shapes = count_calls(detector, monkeypatch, gpu=True)
    tiles = [noisy_tile(hw, seed) for seed, hw in enumerate([(96, 160), (40, 72)])]
    found = detector(tiles)
    assert shapes == ([(3, 96, 160)] * 2 if kind == "torchvision" else [(2, 3, 96, 160)])
    for each, tile in zip(found, tiles, strict=True):
        assert_sees(each, tile, kind)
    with pytest.raises(UserError, match="a tile of 97 x 10 does not fit this network's fixed input of 96 x 160"):
        detector.canvas_hw((97, 10))


@pytest.mark.parametrize("kind", ["yolov8", "yolov5", "yolox", "end-to-end"])
def test_overlapping_boxes_of_one_class_are_suppressed_unless_the_network_does_it(tmp_path: Path, kind: str) -> None:
    # Boxes of 80 pixels round cells 8 apart: an overlap of 72 / 88 = 0.82.
    path = export(tmp_path / "net.onnx", kind, model=ColourNet(kind, box_cells=10.0))
    one_class, two_classes = black(128, 128, red=(8, 8)), black(128, 128, red=(8, 8), green=(8, 9))
    one_class[64:72, 72:80, 0] = 200
    by_default, loosely = load(path), load(path, iou_threshold=0.9)
    assert (by_default.iou_threshold, loosely.iou_threshold) == (0.65 if kind == "yolox" else 0.7, 0.9)
    counts = [[len(each) for each in detections(net([one_class, two_classes]))] for net in (by_default, loosely)]
    assert counts == ([[2, 2], [2, 2]] if kind == "end-to-end" else [[1, 2], [2, 2]])


@pytest.mark.parametrize("kind", SUPPORTED)
def test_boxes_under_the_score_threshold_are_dropped(exports: dict[str, str], kind: str) -> None:
    tile = black(32, 64, red=(0, 0))
    tile[8:16, 16:24, 0] = 100
    scores = [detections(load(exports[kind], score_threshold=low)([tile]))[0].scores for low in (0.3, 0.4)]
    np.testing.assert_allclose(scores[0], [0.9, 0.9 * 100 / 255], atol=1e-3)
    np.testing.assert_allclose(scores[1], [0.9], atol=1e-3)


def test_boxes_are_clipped_to_the_tile_and_dropped_in_the_padding(tmp_path: Path) -> None:
    path = export(tmp_path / "net.onnx", "yolov8", model=ColourNet("yolov8", box_cells=3.0))
    (found,) = detections(load(path)([black(20, 12, red=(0, 0))]))
    np.testing.assert_allclose(found.boxes, [[0, 0, 12, 16]], atol=1e-3)


@pytest.mark.parametrize("kind", ["yolov8", "yolov5", "yolox", "queries", "end-to-end"])
def test_a_network_that_breaks_on_a_tile_costs_that_tile_alone(
    exports: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load(exports[kind])
    count_calls(detector, monkeypatch, gpu=True)
    run = detector._network.session.run

    def broken(*arguments: Any) -> Any:
        outputs = [np.array(output) for output in run(*arguments)]
        outputs[0][1, 0, 0] = np.nan
        return outputs

    monkeypatch.setattr(detector._network.session, "run", broken)
    first, second, third = detector([black(64, 64, red=(0, 0))] * 3)
    assert isinstance(second, TileError)
    assert second.reason == "the detector gave 1 values that are NaN or infinite: check its weights and precision"
    assert [len(each) for each in detections([first, third])] == [1, 1]


# --- what the network takes ----------------------------------------------------------------------------


def test_a_fixed_batch_that_cannot_be_freed_is_filled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalenet_ray.models.onnx_network.free_axes", lambda data, sizes: data)
    detector = load(export(tmp_path / "net.onnx", "yolov8", batch=4, free=()))
    shapes = count_calls(detector, monkeypatch)
    tiles = [noisy_tile((96, 160), seed) for seed in range(5)]
    found = detector(tiles)
    assert shapes == [(4, 3, 96, 160)] * 2
    for each, tile in zip(found, tiles, strict=True):
        assert_sees(each, tile, "yolov8")


def test_axes_stay_fixed_where_freeing_them_changes_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(tmp_path / "net.onnx", "yolov8", free=())
    free = export(tmp_path / "free.onnx", "yolov8", model=ColourNet("yolov8", box_cells=1.1))
    monkeypatch.setattr("scalenet_ray.models.onnx_network.free_axes", lambda data, sizes: Path(free).read_bytes())
    detector = load(path)
    assert "batch 1, size 96 x 160" in detector.description
    tile = noisy_tile((96, 160))
    assert_sees(detector([tile, tile])[1], tile, "yolov8")


def test_a_network_of_fixed_size_that_computes_its_grid_is_freed(tmp_path: Path) -> None:
    path = export(tmp_path / "net.onnx", "yolov8", model=GridOfAnySize(), free=("batch",))
    detector = load(path)
    assert "batch free, size free" in detector.description
    assert detector.canvas_hw((40, 40)) == (64, 64)
    assert detector.input_side == 160
    tile = noisy_tile((64, 224))
    assert_sees(detector([tile])[0], tile, "yolov8")


class GridOfAnySize(ColourNet):
    """A network whose centres are computed from the pixels, so that no size is in its graph."""

    def __init__(self) -> None:
        super().__init__("yolov8")

    def forward(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        parts = []
        for stride, conv in zip(self.strides, self.levels, strict=True):
            found = conv(images).relu()
            one = found[:, :1] * 0 + 1
            centres = [(one.cumsum(axis) - 0.5) * stride for axis in (3, 2)]
            parts.append(torch.cat([*centres, one * stride, one * stride, found], 1).flatten(2))
        return (torch.cat(parts, 2),)


def test_a_network_of_stride_64_has_canvases_of_its_multiples(tmp_path: Path) -> None:
    model = ColourNet("yolov8", strides=(8, 16, 32, 64))
    detector = load(export(tmp_path / "net.onnx", "yolov8", model=model, hw=(128, 192)))
    assert [detector.canvas_hw((side, side)) for side in (1, 65, 129)] == [(64, 64), (128, 128), (192, 192)]
    tile = noisy_tile((72, 96))
    assert_sees(detector([tile])[0], tile, "yolov8")


@pytest.mark.parametrize("kind", ["end-to-end", "queries"])
def test_a_network_that_chooses_300_boxes_has_canvases_of_as_many_cells(tmp_path: Path, kind: str) -> None:
    model = ColourNet(kind, queries=300)
    detector = load(export(tmp_path / "net.onnx", kind, model=model, hw=(256, 256)))
    assert detector.canvas_hw((8, 8)) == (128, 128)
    tile = noisy_tile((40, 40))
    assert_sees(detector([tile])[0], tile, kind)


def test_an_input_of_float16_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = load(export(tmp_path / "net.onnx", "yolov8", model=HalfInput("yolov8"), half=True))
    tile = noisy_tile((96, 160))
    (found,) = detections(detector([tile]))
    boxes, scores, _ = seen_in(tile)
    assert len(found) == len(boxes)
    np.testing.assert_allclose(found.scores, scores, atol=2e-3)


class HalfInput(ColourNet):
    """A network whose input and output are float16."""

    def half(self) -> HalfInput:
        return self

    def forward(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return tuple(output.half() for output in super().forward(images.float(), sizes))


@pytest.mark.parametrize(("order", "by_file"), [("RGB", False), ("BGR", False), ("BGR", True)])
def test_mean_deviation_and_order_come_from_the_metadata_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, by_file: bool
) -> None:
    metadata = {"mean": "[0.5, 0.25, 0]", "std": "[0.5, 1, 0.25]", "channel_order": order}
    path = export(tmp_path / "net.onnx", "yolov8", metadata={"channel_order": "RGB"} if by_file else metadata)
    if by_file:
        (tmp_path / "input.yaml").write_text(
            "mean: [0.5, 0.25, 0]\nstd: [0.5, 1, 0.25]\nchannel_order: BGR\npadding: 0\n"
        )
        path = f"{path}@{tmp_path / 'input.yaml'}"
    detector = load(path)
    seen: list[np.ndarray] = []
    run = detector._network.session.run

    def watched(names: Any, feed: dict[str, np.ndarray], options: Any) -> Any:
        seen.append(feed["images"])
        return run(names, feed, options)

    monkeypatch.setattr(detector._network.session, "run", watched)
    tile = np.full((64, 32, 3), (255, 51, 102), np.uint8)
    detector([tile])
    image = seen[0][0] if order == "RGB" else seen[0][0, ::-1]
    np.testing.assert_allclose(image[:, 0, 0], [1, -0.05, 1.6], atol=1e-6)
    grey = 0 if by_file else 114 / 255
    np.testing.assert_allclose(image[:, 0, 63], [grey * 2 - 1, grey - 0.25, grey * 4], atol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "side"), [({}, 640), ({"imgsz": "[384, 512]"}, 512), ({"imgsz": "320"}, 320), ({"stride": "32"}, 640)]
)
def test_the_input_side_is_the_metadatas(tmp_path: Path, metadata: dict[str, str], side: int) -> None:
    assert load(export(tmp_path / "net.onnx", "yolov8", metadata=metadata)).input_side == side


def test_a_data_yaml_names_the_classes_and_one_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "net.onnx", "yolov8")
    count = len(load(path).categories)
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: {[f'thing {i}' for i in range(count)]}\n")
    assert list(load(f"{path}@{tmp_path / 'data.yaml'}").categories.values())[-1] == f"thing {count - 1}"
    (tmp_path / "data.yaml").write_text("padding: 256")
    with pytest.raises(UserError, match="'padding' must be a grey level from 0 to 255, got '256'"):
        load(f"{path}@{tmp_path / 'data.yaml'}")
    (tmp_path / "data.yaml").write_text("nc: 3")
    with pytest.raises(UserError, match="must give names, categories, mean"):
        load(f"{path}@{tmp_path / 'data.yaml'}")


# --- what is said, and real weights --------------------------------------------------------------------


def test_what_a_file_was_taken_for_is_logged_and_checked(
    exports: dict[str, str], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = "YOLOv8, 11 or 12, [batch, 84, cells]; batch free, size free; classes: COCO's 80, since the file names none"
    with caplog.at_level(logging.INFO):
        load(exports["yolov8"])
    assert f"{exports['yolov8']} was taken for {taken}" in caplog.text
    Image.fromarray(noisy_tile((96, 160))).save(tmp_path / "1.png")
    job = CheckInputs(
        images=str(tmp_path), policies=("whole",), networks=NetworkSpec(detector=f"onnx:{exports['yolov8']}")
    )
    assert main(job) == 0
    assert f"taken for {taken}\n" in capsys.readouterr().out


def test_yolo11n_finds_what_a_decode_by_hand_finds(real_data: Path) -> None:
    path = str(real_data / "models/yolo11n.onnx")
    detector = load(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    files = sorted((real_data / "coco/val2017").glob("*.jpg"))[:6]
    tiles = [np.asarray(Image.open(file).convert("RGB").resize((640, 640))) for file in files]
    found = detections(detector(tiles))
    assert sum(map(len, found)) > 60
    for tile, each in zip(tiles, found, strict=True):
        (columns,) = session.run(None, {"images": tile.transpose(2, 0, 1)[None].astype(np.float32) / 255})[0]
        kept: list[tuple[float, int, np.ndarray]] = []
        for column in sorted(columns.T, key=lambda row: -row[4:].max()):
            score, label, (x, y, w, h) = column[4:].max(), int(column[4:].argmax()), column[:4]
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            if score < 0.01:
                break
            if all(label != other or overlap(box, better) <= 0.7 for _, other, better in kept):
                kept.append((score, label, box))
        assert len(each) == len(kept)
        np.testing.assert_allclose(each.scores, [row[0] for row in kept], atol=1e-4)
        assert each.labels.tolist() == [sorted(COCO_CATEGORIES)[row[1]] for row in kept]
        np.testing.assert_allclose(each.boxes, np.clip([row[2] for row in kept], 0, 640), atol=0.05)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """IoU of two boxes, xyxy."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = sides.clip(0).prod()
    return shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared)
