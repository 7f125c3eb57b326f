"""Detectors by name: the registry, a user's own class, and what is said when a name is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalenet_ray.models.detectors import load_detector

OWN = """
from scalenet_ray.core.detections import Detections

class Whole:
    input_side = 64
    categories = {7: "thing"}
    iou_threshold = 0.5

    def canvas_hw(self, hw):
        return hw

    def __call__(self, pixels):
        return [Detections([[0, 0, tile.shape[1], tile.shape[0]]], [1.0], [7]) for tile in pixels]

class Partial:
    input_side = 64
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module in the current directory."""
    (tmp_path / "detectors_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "detectors_of_mine", raising=False)
    return "detectors_of_mine"


def test_a_class_in_the_current_directory_is_a_detector(own_module: str) -> None:
    detector = load_detector(f"{own_module}:Whole")
    found = detector([np.zeros((4, 6, 3), np.uint8)])[0]
    assert found.boxes.tolist() == [[0, 0, 6, 4]]  # type: ignore[union-attr]
    assert detector.categories == {7: "thing"}


def test_a_class_that_lacks_part_of_the_protocol_is_told_what(own_module: str) -> None:
    with pytest.raises(ValueError, match=r"lacks categories, iou_threshold, canvas_hw, __call__"):
        load_detector(f"{own_module}:Partial")


def test_a_class_that_is_not_there_is_named(own_module: str) -> None:
    with pytest.raises(ValueError, match="must have a class 'Absent'"):
        load_detector(f"{own_module}:Absent")


def test_a_module_whose_own_import_fails_says_so_itself(own_module: str) -> None:
    Path(f"{own_module}.py").write_text("import absent_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        load_detector(f"{own_module}:Whole")


@pytest.mark.parametrize(
    "spec", ["yolo-onnx:net.onnx", "net.onnx", "yolox-onnx:", "yolox-onnx", "absent_module:Class", "absent.part:Class"]
)
def test_an_unknown_kind_is_told_the_known_ones(spec: str) -> None:
    wanted = "kind:what with a kind of tiny, torchvision, yolox-onnx, or module:Class of your own, got"
    with pytest.raises(ValueError, match=f"{wanted} '{spec}'"):
        load_detector(spec)


@pytest.mark.parametrize(
    "spec", ["tiny:{}.safetensors", "torchvision:{}.pth", "torchvision:fcos_resnet50_fpn@{}.pth", "yolox-onnx:{}.onnx"]
)
def test_a_missing_file_is_named_by_every_kind(tmp_path: Path, spec: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_detector(spec.format(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["score_threshold", "iou_threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_thresholds_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got {value}"):
        load_detector("yolox-onnx:net.onnx", **{name: value})  # type: ignore[arg-type]


def test_onnx_detectors_never_load_torch() -> None:
    code = (
        "import sys, scalenet_ray.models.detectors\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "import scalenet_ray.models.yolox\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
