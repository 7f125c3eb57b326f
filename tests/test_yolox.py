"""The YOLOX adapter, on a hand-made network whose answers follow from the tile's colours."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalenet_ray.core.errors import TileError
from scalenet_ray.models.coco_categories import COCO_CATEGORIES
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.padding import padded
from scalenet_ray.models.yolox import YoloxDetector
from tests.oracles import detections

FREE = ("batch", 3, "height", "width")
PERSON, BICYCLE, CAR = 1, 2, 3


def colour_net(
    path: Path,
    shape: tuple = FREE,
    classes: int = 80,
    box_cells: float = 1.0,
    metadata: dict[str, str] | None = None,
    flat_batch: int = 0,
) -> str:
    """Write a network with YOLOX's input and output: it sees a box in each cell of 8 pixels that isn't black.

    Its classes 0, 1 and 2 score 0.9 times the cell's mean red, green and blue, over 256. The boxes are `box_cells`
    cells wide and high, round the cell's centre. The cells of 16 and 32 pixels see nothing. `flat_batch` 1 is what
    YOLOX's exporter writes, and holds for a batch of 1 alone.

    All weights are 0 or a power of two, so that float32 holds each sum exactly: whatever the order in which a CPU adds,
    the answers are the same to the bit, and cells that tie do so everywhere.
    """
    nodes, parts, weights = [], [], {"flat": np.array([flat_batch, 5 + classes, -1], np.int64)}
    for stride in (8, 16, 32):
        weight, bias = np.zeros((5 + classes, 3, stride, stride), np.float32), np.zeros(5 + classes, np.float32)
        bias[:5] = [0.5, 0.5, math.log(box_cells), math.log(box_cells), 0.9 if stride == 8 else 0.0]
        for column, channel in ((5, 2), (6, 1), (7, 0)):
            weight[column, channel] = 1 / (256 * stride * stride)
        weights |= {f"w{stride}": weight, f"b{stride}": bias}
        sides = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes += [
            helper.make_node("Conv", ["images", f"w{stride}", f"b{stride}"], [f"c{stride}"], **sides),
            helper.make_node("Reshape", [f"c{stride}", "flat"], [f"r{stride}"]),
        ]
        parts.append(f"r{stride}")
    nodes += [
        helper.make_node("Concat", parts, ["all"], axis=2),
        helper.make_node("Transpose", ["all"], ["output"], perm=[0, 2, 1]),
    ]
    is_fixed = isinstance(shape[2], int) and isinstance(shape[3], int)
    rows = sum(shape[2] * shape[3] // s**2 for s in (8, 16, 32)) if is_fixed else "rows"
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (shape[0], rows, 5 + classes))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return str(path)


def black(height: int, width: int, **cells: tuple[int, int]) -> np.ndarray:
    """A black tile with cells of 8 pixels, (row, column) each, in the colours that name them."""
    tile = np.zeros((height, width, 3), np.uint8)
    for colour, (row, column) in cells.items():
        tile[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8, ("red", "green", "blue").index(colour)] = 255
    return tile


def count_calls(detector: YoloxDetector, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that the session is given from now on."""
    shapes: list[tuple[int, ...]] = []
    run = detector.session.run

    def counted(names: Any, feed: dict[str, np.ndarray]) -> Any:
        shapes.append(feed["images"].shape)
        return run(names, feed)

    monkeypatch.setattr(detector.session, "run", counted)
    return shapes


def pretend_gpu(detector: YoloxDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session says that it works on a GPU, where tiles are worth batching."""
    monkeypatch.setattr(detector.session, "get_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.fixture
def net(tmp_path: Path) -> str:
    return colour_net(tmp_path / "net.onnx")


def test_each_colour_is_found_where_it_is_in_tile_pixels(net: str) -> None:
    detector = load_detector(f"yolox-onnx:{net}")
    (found,) = detections(detector([black(40, 64, red=(1, 2), green=(3, 5), blue=(0, 7))]))
    order = np.argsort(found.labels)
    assert found.labels[order].tolist() == [PERSON, BICYCLE, CAR]
    np.testing.assert_allclose(found.boxes[order], [[16, 8, 24, 16], [40, 24, 48, 32], [56, 0, 64, 8]], atol=1e-4)
    np.testing.assert_allclose(found.scores, 0.9 * 255 / 256, rtol=1e-6)


def test_nothing_is_found_in_the_padding(net: str) -> None:
    (found,) = detections(load_detector(f"yolox-onnx:{net}")([black(40, 24)]))
    assert found.boxes.shape == (0, 4)


def test_boxes_are_clipped_to_the_tile(tmp_path: Path) -> None:
    detector = load_detector(f"yolox-onnx:{colour_net(tmp_path / 'net.onnx', box_cells=3.0)}")
    (found,) = detections(detector([black(20, 12, red=(0, 0))]))
    np.testing.assert_allclose(found.boxes[0], [0, 0, 12, 16], atol=1e-4)


def test_a_tile_of_one_pixel_and_no_tile_at_all_work(net: str) -> None:
    detector = load_detector(f"yolox-onnx:{net}")
    assert detector([]) == []
    (found,) = detections(detector([np.full((1, 1, 3), 255, np.uint8)]))
    assert found.boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("gpu", [False, True])
def test_tiles_of_one_canvas_are_one_call_on_a_gpu_and_equal_one_by_one(
    net: str, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (20, 33), (40, 64), (32, 32), (64, 33), (1, 1), (60, 50), (64, 64)]
    tiles = [rng.integers(0, 256, (*hw, 3)).astype(np.uint8) for hw in sizes]
    detector = YoloxDetector.load(net, iou_threshold=0.3)
    alone = [detections(detector([tile]))[0] for tile in tiles]
    shapes = count_calls(detector, monkeypatch)
    if gpu:
        pretend_gpu(detector, monkeypatch)
    together = detections(detector(tiles))
    batches = [(5, 3, 64, 64), (1, 3, 32, 64), (2, 3, 32, 32)]
    assert shapes == (batches if gpu else [(1, *shape) for count, *shape in batches for _ in range(count)])
    for one, other in zip(alone, together, strict=True):
        # Of this network to the bit, even in a batch.
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("hw", "canvas"), [((1, 1), (32, 32)), ((32, 7), (32, 32)), ((33, 32), (64, 32)), ((416, 312), (416, 320))]
)
def test_the_canvas_is_the_smallest_of_whole_strides(net: str, hw: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert load_detector(f"yolox-onnx:{net}").canvas_hw(hw) == canvas


def test_what_an_export_fixed_is_freed_so_that_tiles_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = YoloxDetector.load(colour_net(tmp_path / "net.onnx", (1, 3, 96, 96), flat_batch=1))
    shapes = count_calls(detector, monkeypatch)
    pretend_gpu(detector, monkeypatch)
    found = detections(detector([black(8, 8, red=(0, 0)), black(16, 32, blue=(1, 2)), black(128, 64, green=(15, 1))]))
    assert shapes == [(2, 3, 32, 32), (1, 3, 128, 64)]
    np.testing.assert_allclose([each.boxes[0] for each in found], [[0, 0, 8, 8], [16, 8, 24, 16], [8, 120, 16, 128]])
    # What it was exported for is still the size of a whole image.
    assert detector.input_side == 96


@pytest.fixture
def unfreeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the size were fixed in a place where it is not looked for."""
    monkeypatch.setattr("scalenet_ray.models.yolox.free_axes", lambda data: data)


@pytest.mark.usefixtures("unfreeable")
def test_a_fixed_input_takes_tiles_one_by_one_on_its_own_canvas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = YoloxDetector.load(colour_net(tmp_path / "net.onnx", (1, 3, 64, 96)))
    shapes = count_calls(detector, monkeypatch)
    found = detections(detector([black(8, 8, red=(0, 0)), black(64, 96, blue=(7, 11))]))
    assert shapes == [(1, 3, 64, 96)] * 2
    np.testing.assert_allclose(found[1].boxes, [[88, 56, 96, 64]], atol=1e-4)
    assert detector.input_side == 64
    assert detector.canvas_hw((8, 8)) == (64, 96)


@pytest.mark.usefixtures("unfreeable")
def test_a_tile_over_the_fixed_input_is_refused(tmp_path: Path) -> None:
    detector = YoloxDetector.load(colour_net(tmp_path / "net.onnx", (1, 3, 64, 64)))
    with pytest.raises(ValueError, match="a tile of 65 x 10 does not fit this network's fixed input of 64 x 64"):
        detector([black(65, 10)])


def test_overlapping_boxes_of_one_class_are_suppressed_and_of_two_are_not(tmp_path: Path) -> None:
    # Boxes of 80 pixels round cells 8 apart: an overlap of 72 / 88 = 0.82.
    path = colour_net(tmp_path / "net.onnx", box_cells=10.0)
    two_classes = black(128, 128, red=(8, 8), green=(8, 9))
    one_class = black(128, 128, red=(8, 8))
    one_class[64:72, 72:80, 0] = 200
    by_default, loosely = YoloxDetector.load(path), YoloxDetector.load(path, iou_threshold=0.9)
    assert (by_default.iou_threshold, loosely.iou_threshold) == (0.65, 0.9)
    assert [len(each) for each in detections(by_default([one_class, two_classes]))] == [1, 2]
    assert [len(each) for each in detections(loosely([one_class, two_classes]))] == [2, 2]


def test_boxes_under_the_score_threshold_are_dropped(net: str) -> None:
    tile = black(32, 32, red=(1, 1))
    tile[8:16, 16:24, 1] = 100
    assert len(detections(YoloxDetector.load(net, score_threshold=0.3)([tile]))[0]) == 2
    assert len(detections(YoloxDetector.load(net, score_threshold=0.4)([tile]))[0]) == 1


@pytest.mark.parametrize(("column", "value"), [(4, np.nan), (60, np.inf), (0, np.nan), (2, 1000.0)])
def test_a_network_that_breaks_on_a_tile_costs_that_tile_alone(
    net: str, monkeypatch: pytest.MonkeyPatch, column: int, value: float
) -> None:
    detector = YoloxDetector.load(net)
    run = detector.session.run

    def broken(names: Any, feed: dict[str, np.ndarray]) -> Any:
        output = np.array(run(names, feed)[0])
        output[1, 0, column] = value
        return [output]

    monkeypatch.setattr(detector.session, "run", broken)
    pretend_gpu(detector, monkeypatch)
    first, second, third = detector([black(32, 32, red=(0, 0))] * 3)
    assert isinstance(second, TileError)
    assert "infinite" in second.reason
    assert [len(each) for each in detections([first, third])] == [1, 1]


def test_other_classes_are_named_in_the_files_metadata(tmp_path: Path) -> None:
    metadata = {"categories": json.dumps({"30": "blue", "10": "red", "20": "green"})}
    detector = load_detector(f"yolox-onnx:{colour_net(tmp_path / 'net.onnx', classes=3, metadata=metadata)}")
    assert detector.categories == {10: "red", 20: "green", 30: "blue"}
    assert detections(detector([black(32, 32, green=(0, 0))]))[0].labels.tolist() == [20]


def test_other_classes_without_names_are_refused(tmp_path: Path) -> None:
    path = colour_net(tmp_path / "net.onnx", classes=3)
    with pytest.raises(ValueError, match=r"net\.onnx: the output must be \[batch, rows, 85\] for 80 .* metadata"):
        load_detector(f"yolox-onnx:{path}")


@pytest.mark.parametrize("shape", [(8, 3, 64, 64), (1, 3, 64, "width"), (1, 3, 40, 40)])
def test_an_input_that_is_not_yoloxs_is_refused(tmp_path: Path, shape: tuple) -> None:
    path = colour_net(tmp_path / "net.onnx", shape)
    with pytest.raises(ValueError, match=r"the input must be \[batch, 3, height, width\], .*, got \["):
        load_detector(f"yolox-onnx:{path}")


def test_rows_that_are_not_of_the_three_strides_are_refused(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = YoloxDetector.load(net)
    monkeypatch.setattr(detector.session, "run", lambda *_: [np.zeros((1, 5, 85), np.float32)])
    with pytest.raises(ValueError, match=r"must answer \[1, 3, 32, 32\] with \[1, 21, 85\], .* got \[1, 5, 85\]"):
        detector([black(32, 32)])


def test_pixels_that_are_no_rgb_bytes_are_refused(net: str) -> None:
    with pytest.raises(
        ValueError, match=r"a tile must be \[height, width, 3\] uint8 RGB, got float64 of shape \[8, 8\]"
    ):
        load_detector(f"yolox-onnx:{net}")([np.zeros((8, 8))])


def test_a_device_that_onnxruntime_lacks_is_refused(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match=r"device 'cuda:1' needs onnxruntime-gpu, got one with \['CPU"):
        load_detector(f"yolox-onnx:{net}", device="cuda:1")
    with pytest.raises(ValueError, match="device must be cpu, cuda, cuda:INDEX, tensorrt or tensorrt:INDEX, got 'tpu'"):
        load_detector(f"yolox-onnx:{net}", device="tpu")


def test_the_network_takes_as_many_threads_as_the_process_is_given(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert YoloxDetector.load(net).session.get_session_options().intra_op_num_threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert YoloxDetector.load(net).session.get_session_options().intra_op_num_threads == 0


def _whole_tiles(coco: COCO, folder: Path, side: int) -> dict[int, np.ndarray]:
    """Image id -> the whole image's tile, reduced as the network's makers did: bilinear, not antialiased."""
    tiles = {}
    for image_id, info in coco.imgs.items():
        with Image.open(folder / info["file_name"]) as image:
            ratio = min(side / image.height, side / image.width)
            size = (max(1, int(image.width * ratio)), max(1, int(image.height * ratio)))
            matrix = (image.width / size[0], 0, 0, 0, image.height / size[1], 0)
            rgb = image.convert("RGB")
            tiles[image_id] = np.asarray(rgb.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    return tiles


def test_yolox_nano_reaches_its_measured_ap_on_real_images(real_data: Path) -> None:
    """31.3 and 12.5: the file's own measurement on these 103 images, on square canvases, by pycocotools."""
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(real_data / "coco/annotations/instances_val2017.json"))
    assert {key: each["name"] for key, each in coco.cats.items()} == COCO_CATEGORIES
    tiles = _whole_tiles(coco, real_data / "coco/val2017", 416)
    detector = load_detector(f"yolox-onnx:{real_data}/models/yolox_nano_dynamic.onnx")
    ids, results = list(tiles), []
    for start in range(0, len(ids), 8):
        batch = ids[start : start + 8]
        squares = padded([tiles[i] for i in batch], (416, 416))
        for image_id, found in zip(batch, detections(detector(list(squares))), strict=True):
            info, (height, width) = coco.imgs[image_id], tiles[image_id].shape[:2]
            boxes = np.clip(found.boxes, 0, [width, height, width, height]) * np.array(
                [info["width"] / width, info["height"] / height] * 2
            )
            boxes[:, 2:] -= boxes[:, :2]
            results += [
                {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
                for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
            ]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")  # type: ignore[arg-type]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap_small = 100 * evaluation.stats[0], 100 * evaluation.stats[3]
    assert ap == pytest.approx(31.3, abs=0.5)
    assert ap_small == pytest.approx(12.5, abs=0.5)


def test_the_fixed_and_the_free_file_of_yolox_nano_find_the_same(real_data: Path) -> None:
    paths = sorted((real_data / "coco/val2017").glob("*.jpg"))[:4]
    tiles = [np.asarray(Image.open(path).convert("RGB").resize((416, 320))) for path in paths]
    fixed = detections(load_detector(f"yolox-onnx:{real_data}/models/yolox_nano.onnx")(tiles))
    free = detections(load_detector(f"yolox-onnx:{real_data}/models/yolox_nano_dynamic.onnx")(tiles))
    assert sum(map(len, fixed)) > 20
    for one, other in zip(fixed, free, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        np.testing.assert_allclose(one.boxes, other.boxes, atol=0.01)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
