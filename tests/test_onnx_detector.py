"""`onnx:PATH`: each kind of export is recognised, and finds what is in the picture."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from scalenet_ray.commands.check import CheckInputs, main
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.models.coco_categories import COCO_CATEGORIES
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.onnx_detector import OnnxDetector
from scalenet_ray.models.spec import NetworkSpec
from scalenet_ray.models.yolox import YoloxDetector
from tests.colour_exports import KINDS, ColourNet, export, noisy_tile, seen_in
from tests.test_yolox import black, colour_net

SUPPORTED = sorted(KINDS.keys() - {"yolox-decoded"})
SEVERAL_CLASSES = ("queries", "rtdetr-rows")
SIZES = [(96, 160), (64, 128), (40, 72), (96, 160), (128, 64), (8, 8)]


def load(path: str | Path, **settings: Any) -> OnnxDetector:
    detector = load_detector(f"onnx:{path}", **settings)
    assert isinstance(detector, OnnxDetector)
    return detector


def detections(found: list[Detections | TileError]) -> list[Detections]:
    assert all(isinstance(each, Detections) for each in found), found
    return found  # type: ignore[return-value]


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


@pytest.mark.parametrize("kind", SUPPORTED)
def test_each_kind_finds_what_is_in_a_tile_of_its_canvas_size(exports: dict[str, str], kind: str) -> None:
    tile = noisy_tile((96, 160))
    detector = load(exports[kind])
    assert detector.canvas_hw((96, 96)) == (96, 96)
    assert_sees(detector([tile])[0], tile, kind)


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


@pytest.mark.parametrize("kind", SUPPORTED)
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


def test_yolox_has_its_own_adapter(tmp_path: Path) -> None:
    detector = load_detector(f"onnx:{colour_net(tmp_path / 'net.onnx')}")
    assert isinstance(detector, YoloxDetector)
    assert detector.description == "YOLOX, [batch, cells, 85]; classes: COCO's 80, since the file names none"
    (found,) = detections(detector([black(40, 64, green=(3, 5))]))
    np.testing.assert_allclose(found.boxes, [[40, 24, 48, 32]], atol=1e-4)


@pytest.mark.parametrize("kind", ["yolov8", "yolov5", "end-to-end"])
def test_overlapping_boxes_of_one_class_are_suppressed_unless_the_network_does_it(tmp_path: Path, kind: str) -> None:
    # Boxes of 80 pixels round cells 8 apart: an overlap of 72 / 88 = 0.82.
    path = export(tmp_path / "net.onnx", kind, model=ColourNet(kind, box_cells=10.0))
    one_class, two_classes = black(128, 128, red=(8, 8)), black(128, 128, red=(8, 8), green=(8, 9))
    one_class[64:72, 72:80, 0] = 200
    by_default, loosely = load(path), load(path, iou_threshold=0.9)
    assert (by_default.iou_threshold, loosely.iou_threshold) == (0.7, 0.9)
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


@pytest.mark.parametrize("kind", ["yolov8", "yolov5", "queries", "end-to-end"])
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


def test_mean_and_deviation_come_from_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"mean": "[0.5, 0.25, 0]", "std": "[0.5, 1, 0.25]"}
    detector = load(export(tmp_path / "net.onnx", "yolov8", metadata=metadata))
    seen: list[np.ndarray] = []
    run = detector._network.session.run

    def watched(names: Any, feed: dict[str, np.ndarray], options: Any) -> Any:
        seen.append(feed["images"])
        return run(names, feed, options)

    monkeypatch.setattr(detector._network.session, "run", watched)
    tile = np.full((64, 32, 3), (255, 51, 102), np.uint8)
    detector([tile])
    np.testing.assert_allclose(seen[0][0, :, 0, 0], [1, -0.05, 1.6], atol=1e-6)
    grey = 114 / 255
    np.testing.assert_allclose(seen[0][0, :, 0, 63], [grey * 2 - 1, grey - 0.25, grey * 4], atol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "side"), [({}, 640), ({"imgsz": "[384, 512]"}, 512), ({"imgsz": "320"}, 320), ({"stride": "32"}, 640)]
)
def test_the_input_side_is_the_metadatas(tmp_path: Path, metadata: dict[str, str], side: int) -> None:
    assert load(export(tmp_path / "net.onnx", "yolov8", metadata=metadata)).input_side == side


# --- names of classes ----------------------------------------------------------------------------------


NAMES = {"names": "{0: 'red', 1: \"green's\", 2: 'blue'}"}


@pytest.mark.parametrize(
    ("metadata", "categories"),
    [
        (NAMES, {0: "red", 1: "green's", 2: "blue"}),
        ({"names": '["red", "green", "blue"]'}, {0: "red", 1: "green", 2: "blue"}),
        ({"categories": json.dumps({"30": "blue", "10": "red", "20": "green"})}, {10: "red", 20: "green", 30: "blue"}),
    ],
)
def test_classes_are_named_in_the_metadata(
    tmp_path: Path, metadata: dict[str, str], categories: dict[int, str]
) -> None:
    detector = load(export(tmp_path / "net.onnx", "yolov8", classes=3, metadata=metadata))
    assert detector.categories == categories
    (found,) = detections(detector([black(64, 64, green=(1, 1))]))
    assert [categories[label][:5] for label in found.labels] == ["green"]


@pytest.mark.parametrize(("kind", "first"), [("yolov8", 0), ("target-sizes", 0), ("torchvision", 1)])
def test_a_file_of_names_comes_first(tmp_path: Path, kind: str, first: int) -> None:
    path = export(tmp_path / "net.onnx", kind, classes=3, metadata=NAMES)
    (tmp_path / "n@mes.txt").write_bytes(b"\xef\xbb\xbfrouge\r\nvert clair \r\nbleu\r\n\r\n")
    detector = load(f"{path}@{tmp_path / 'n@mes.txt'}")
    assert detector.categories == {first: "rouge", first + 1: "vert clair", first + 2: "bleu"}
    assert detector.description.endswith(f"classes: {tmp_path / 'n@mes.txt'}")
    (found,) = detections(detector([black(64, 64, green=(1, 1))]))
    assert found.labels.tolist() == [first + 1]


def test_yolox_takes_a_file_of_names_too(tmp_path: Path) -> None:
    path = colour_net(tmp_path / "net.onnx", classes=3)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue")
    detector = load_detector(f"onnx:{path}@{tmp_path / 'names.txt'}")
    assert detector.categories == {0: "red", 1: "green", 2: "blue"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"red\ngreen",
            r"the network has 3 classes by its outputs, got 2 names from .*names\.txt: name them in a file",
        ),
        (b"red\n\ngreen", r"names\.txt must hold class names, one a line, got an empty line 2"),
        (b" \n", r"names\.txt must hold class names, one a line, got an empty file"),
        (b"caf\xe9", r"names\.txt must hold class names in UTF-8"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = export(tmp_path / "net.onnx", "yolov8", classes=3)
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(f"{path}@{tmp_path / 'names.txt'}")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "the network has 3 classes, and its file names none: name them in a file, one a line, as onnx:PATH@FILE"),
        ({"names": "{0: 'red'}"}, "the network has 3 classes by its outputs, got 1 names from metadata 'names'"),
        ({"names": "red, green"}, "metadata 'names' must map class ids to names, or list the names, got 'red, green'"),
        ({"names": "{'red': 0}"}, "metadata 'names' must map class ids to names"),
    ],
)
def test_classes_without_their_names_are_refused(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=rf"net\.onnx: {said}"):
        load(export(tmp_path / "net.onnx", "yolov8", classes=3, metadata=metadata))


@pytest.mark.parametrize("kind", ["end-to-end", "target-sizes"])
def test_a_class_past_the_names_costs_its_tile(tmp_path: Path, kind: str) -> None:
    (tmp_path / "names.txt").write_text("red\ngreen")
    detector = load(f"{export(tmp_path / 'net.onnx', kind)}@{tmp_path / 'names.txt'}")
    good, bad = detector([black(64, 64, green=(0, 0)), black(64, 64, blue=(0, 0))])
    assert isinstance(good, Detections)
    assert isinstance(bad, TileError)
    assert bad.reason.startswith("the detector gave class 2, its classes are 2: name all of them")


# --- what is refused -----------------------------------------------------------------------------------


class Answers(nn.Module):
    """A network with outputs of given shapes."""

    def __init__(self, *shapes: tuple[int, ...], fill: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 8, 8)
        self.shapes, self.fill = shapes, fill

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = self.conv(images).mean() * 0 + self.fill
        return tuple(value.expand(shape) for shape in self.shapes)


@pytest.mark.parametrize(
    ("shapes", "got"),
    [
        ([(1, 1000)], "output0 [1, 1000]"),
        ([(1, 9, 4), (1, 9), (1, 9), (1, 1)], "output0 [1, 9, 4], output1 [1, 9], output2 [1, 9], output3 [1, 1]"),
        ([(1, 3, 80, 80, 85)], "output0 [1, 3, 80, 80, 85]"),
        ([(1, 100, 80), (1, 100, 4)], "output0 [1, 100, 80], output1 [1, 100, 4]"),
        ([(1, 100, 4)], "output0 [1, 100, 4]"),
        ([(1, 77, 90)], "output0 [1, 77, 90]"),
        ([(1, 84, 315)], "output0 [1, 84, 315]"),
    ],
    ids=["classifier", "four outputs", "raw map", "unknown names", "boxes alone", "no shares", "boxes off their cells"],
)
def test_outputs_of_no_known_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], got: str
) -> None:
    monkeypatch.setitem(KINDS, "other", tuple(f"output{i}" for i in range(len(shapes))))
    path = export(tmp_path / "net.onnx", "other", model=Answers(*shapes), free=())
    with pytest.raises(UserError) as error:
        load(path)
    assert f"{path}: a detector's outputs must be [batch, 4 + classes, cells] (YOLOv8" in str(error.value)
    assert f"got {got} for a canvas of 96 x 160" in str(error.value)


def refusal(tmp_path: Path, model: nn.Module | None = None, kind: str = "yolov8", **settings: Any) -> str:
    """What is said of an export that is refused."""
    path = export(tmp_path / "net.onnx", kind, model=model, **settings)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_another_task_is_refused(tmp_path: Path) -> None:
    assert "must detect boxes, got metadata task 'segment'" in refusal(tmp_path, metadata={"task": "segment"})


def test_decoded_yolox_is_refused(tmp_path: Path) -> None:
    assert "must be YOLOX's without decoding, got decoded boxes" in refusal(tmp_path, kind="yolox-decoded")


def test_a_network_that_resizes_its_input_is_refused(tmp_path: Path) -> None:
    class Resizing(ColourNet):
        def forward(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
            return super().forward(nn.functional.interpolate(images, size=(96, 160)))

    assert "got one that resizes its input, which undoes the zoom" in refusal(tmp_path, Resizing("yolov8"))


def test_free_axes_that_are_not_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, ColourNet("yolov8", baked=True))
    assert "a network of free height and width must take canvases of 64 x 128, 128 x 256, 320 x 640" in said


def test_another_kind_at_another_size_is_refused(tmp_path: Path) -> None:
    class OfOneSize(nn.Module):
        """Its grid is that of 64 x 128, whatever the input."""

        def __init__(self) -> None:
            super().__init__()
            self.net = ColourNet("yolov8", baked=True)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.net(images[:, :, :64, :128])

    said = refusal(tmp_path, OfOneSize())
    assert "a detector's outputs must be" in said
    assert "got output0 [1, 84, 168] for a canvas of 96 x 160" in said


@pytest.mark.parametrize("free", [("batch", "height"), ("width",)])
def test_one_free_side_is_refused(tmp_path: Path, free: tuple[str, ...]) -> None:
    said = refusal(tmp_path, free=free)
    assert "height and width both fixed or both free" in said
    assert "got images [" in said


def test_an_input_besides_the_image_is_refused(tmp_path: Path) -> None:
    model = ColourNet("target-sizes")
    path = export(tmp_path / "net.onnx", "target-sizes", model=model)
    renamed = onnx.load(path)
    for node in renamed.graph.node:
        node.input[:] = ["mask" if name == "orig_target_sizes" else name for name in node.input]
    renamed.graph.input[1].name = "mask"
    onnx.save(renamed, path)
    with pytest.raises(
        UserError, match=r"at most orig_target_sizes besides, got images .*, mask \[.* of tensor\(int64"
    ):
        load(path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = ColourNet("yolov8")
    model.levels[0].weight.data[0, 0, 0, 0] = np.nan  # type: ignore[index,operator]
    assert "outputs must be finite, got NaN or infinity for noise" in refusal(tmp_path, model)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {"mean": "[1, 2]"},
            "metadata 'mean' must be a JSON list of a number for red, green and blue each, got '[1, 2]'",
        ),
        ({"std": "[1, 0, 1]"}, "metadata 'std' must be a JSON list"),
        ({"mean": "grey"}, "metadata 'mean' must be a JSON list"),
        ({"imgsz": "large"}, "metadata 'imgsz' must be [height, width] in pixels, got 'large'"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    assert said in refusal(tmp_path, metadata=metadata)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.onnx")
    path = export(tmp_path / "net.onnx", "yolov8")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(f"{path}@{tmp_path / 'nowhere.txt'}")


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
