"""YOLOX in ONNX, on a hand-made network whose answers follow from the tile's colours, and on trained weights."""

from __future__ import annotations

import io
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

from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.models.class_names import COCO_CATEGORIES
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.padding import padded
from tests.colour_exports import export
from tests.oracles import detections

FREE = ("batch", 3, "height", "width")
PERSON, BICYCLE, CAR = 1, 2, 3


def colour_net(
    path: Path,
    shape: tuple = FREE,
    *,
    log_cells: float = 0.0,
    flat_batch: int = 0,
) -> str:
    """Write a network with YOLOX's input and output: it sees a box in each cell of 8 pixels that isn't black.

    Its classes 0, 1 and 2 score 0.9 times the cell's mean red, green and blue, over 256. The boxes lie round the cell's
    centre, e to the power of `log_cells` cells wide and high. The cells of 16 and 32 pixels see nothing. `flat_batch`
    1 is what YOLOX's exporter writes, and holds for a batch of 1 alone.

    All weights are 0 or a power of two, so that float32 holds each sum exactly: whatever the order in which a CPU adds,
    the answers are the same to the bit, and cells that tie do so everywhere.
    """
    nodes, parts, weights = [], [], {"flat": np.array([flat_batch, 85, -1], np.int64)}
    for stride in (8, 16, 32):
        weight, bias = np.zeros((85, 3, stride, stride), np.float32), np.zeros(85, np.float32)
        bias[:5] = [0.5, 0.5, log_cells, log_cells, 0.9 if stride == 8 else 0.0]
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
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, (shape[0], rows, 85))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    path.write_bytes(model.SerializeToString())
    return str(path)


def black(height: int, width: int, **cells: tuple[int, int]) -> np.ndarray:
    """A black tile with cells of 8 pixels, (row, column) each, in the colours that name them."""
    tile = np.zeros((height, width, 3), np.uint8)
    for colour, (row, column) in cells.items():
        tile[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8, ("red", "green", "blue").index(colour)] = 255
    return tile


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
    detector = load_detector(f"yolox-onnx:{colour_net(tmp_path / 'net.onnx', log_cells=math.log(3))}")
    (found,) = detections(detector([black(20, 12, red=(0, 0))]))
    np.testing.assert_allclose(found.boxes[0], [0, 0, 12, 16], atol=1e-4)


def test_a_tile_of_one_pixel_and_no_tile_at_all_work(net: str) -> None:
    detector = load_detector(f"yolox-onnx:{net}")
    assert detector([]) == []
    (found,) = detections(detector([np.full((1, 1, 3), 255, np.uint8)]))
    assert found.boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("hw", "canvas"), [((1, 1), (32, 32)), ((32, 7), (32, 32)), ((33, 32), (64, 32)), ((416, 312), (416, 320))]
)
def test_the_canvas_is_the_smallest_of_whole_strides(net: str, hw: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert load_detector(f"yolox-onnx:{net}").canvas_hw(hw) == canvas


@pytest.mark.parametrize("batch", [1, 4])
def test_what_an_export_fixed_is_freed(tmp_path: Path, batch: int) -> None:
    detector = load_detector(f"yolox-onnx:{colour_net(tmp_path / 'net.onnx', (batch, 3, 96, 96), flat_batch=batch)}")
    found = detections(detector([black(8, 8, red=(0, 0)), black(16, 32, blue=(1, 2)), black(128, 64, green=(15, 1))]))
    np.testing.assert_allclose([each.boxes[0] for each in found], [[0, 0, 8, 8], [16, 8, 24, 16], [8, 120, 16, 128]])
    assert "batch free, size free" in detector.description
    # What it was exported for is still the size of a whole image.
    assert detector.input_side == 96


def test_a_box_of_infinite_size_costs_its_tile(tmp_path: Path) -> None:
    (found,) = load_detector(f"yolox-onnx:{colour_net(tmp_path / 'net.onnx', log_cells=1000.0)}")(
        [black(32, 32, red=(0, 0))]
    )
    assert isinstance(found, TileError)
    assert found.reason == "the detector gave boxes of infinite size: check its weights and precision"


def test_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "net.onnx", "yolov8", classes=3, metadata={"names": "['red', 'green', 'blue']"})
    said = rf"yolox-onnx:{path} must hold a YOLOX .*, got YOLOv8, 11 or 12, \[batch, 7, cells\].*: use onnx:PATH"
    with pytest.raises(UserError, match=said):
        load_detector(f"yolox-onnx:{path}")


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
    assert threads_of(load_detector(f"yolox-onnx:{net}")) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of(load_detector(f"yolox-onnx:{net}")) == 0


def threads_of(detector: Any) -> int:
    return detector._network.session.get_session_options().intra_op_num_threads


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
