"""`onnx:PATH`: names of classes, and files that are refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from tests.colour_exports import KINDS, ColourNet, export
from tests.oracles import detections
from tests.test_onnx_detector import load
from tests.test_yolox import black

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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"red\ngreen",
            r"the network has 3 classes by its outputs, got 2 names from .*names\.txt: name them in a file",
        ),
        (b"red\n\ngreen", r"names\.txt must hold class names, one a line, got an empty line 2"),
        (b" \n", r"names\.txt must hold class names, one a line, got an empty line 1"),
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
        ([(1, 1000)], "as of a classifier, output0 [1, 1000]"),
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
    assert f"got {got} for a canvas of 96 x 160: export a detector" in str(error.value)


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
    assert "got output0 [1, 84, 168] for a canvas of 96 x 160: export a detector" in said


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
        ({"channel_order": "GBR"}, "metadata 'channel_order' must be RGB or BGR, got 'GBR'"),
        ({"imgsz": "large"}, "metadata 'imgsz' must be [height, width] in pixels, got 'large'"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    assert said in refusal(tmp_path, metadata=metadata)


@pytest.mark.parametrize(("part", "said"), [("ir", "IR version: 99"), ("opset", "Opset 99")])
def test_a_file_of_a_newer_version_is_refused(tmp_path: Path, part: str, said: str) -> None:
    path = export(tmp_path / "net.onnx", "yolov8")
    model = onnx.load(path)
    if part == "ir":
        model.ir_version = 99
    else:
        model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises(UserError, match=rf"must be of a version that onnxruntime .* reads, got {said}: export it"):
        load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.onnx")
    path = export(tmp_path / "net.onnx", "yolov8")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(f"{path}@{tmp_path / 'nowhere.txt'}")
