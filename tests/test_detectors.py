"""Detectors by name: the registry, a user's own class, and what is said when a name is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalenet_ray.core.errors import UserError
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
    with pytest.raises(UserError, match=r"raised ModuleNotFoundError: .*'absent_dependency' \(.*line 1\)"):
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


def add_package(folder: Path, package: str, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package, as Python sees one: its module and its metadata on the path."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[scalenet_ray.detectors]\n{kinds}\n")
    maker = """
def make(what, *, device, score_threshold, iou_threshold):
    detector = Whole()
    detector.made_with = (what, device, score_threshold, iou_threshold)
    return detector

def make_partial(what, **settings):
    return Partial()
"""
    (folder / f"{package}.py").write_text(OWN + maker)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, package, raising=False)


def test_an_installed_package_adds_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_package(tmp_path, "their_nets", "their-net = their_nets:make\nhalf = their_nets:make_partial", monkeypatch)
    detector = load_detector("their-net:weights.bin", device="cuda:1", score_threshold=0.2)
    assert detector.made_with == ("weights.bin", "cuda:1", 0.2, None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"detector 'half:x' must have .* lacks categories"):
        load_detector("half:x")
    with pytest.raises(ValueError, match="kind of half, their-net, tiny, torchvision, yolox-onnx"):
        load_detector("their-net")


def test_a_package_that_takes_a_kind_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_package(tmp_path, "taker", "tiny = taker:make", monkeypatch)
    with pytest.raises(ValueError, match="'tiny' from scalenet_ray itself and package taker: rename one"):
        load_detector("tiny:weights.bin")


def test_two_packages_that_add_one_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("one_maker", "other_maker"):
        add_package(tmp_path / package, package, f"same = {package}:make", monkeypatch)
    with pytest.raises(ValueError, match="'same' from package one_maker and package other_maker"):
        load_detector("same:weights.bin")


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


# --- what others' code raises -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "class One:\n    def __init__(self):\n        raise KeyError('weights')",
            r"it raised KeyError: 'weights' .*line 3\)",
        ),
        ("import no_such_library", r"it raised ModuleNotFoundError: No module named 'no_such_library' .*line 1\)"),
        ("1 / 0", r"it raised ZeroDivisionError: division by zero .*line 1\)"),
        ("class One:\n    def", r"it raised SyntaxError: invalid syntax"),
    ],
    ids=["constructor", "import", "module", "syntax"],
)
def test_what_an_own_class_raises_while_it_is_made_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str, request: pytest.FixtureRequest
) -> None:
    module = f"own_detector_{request.node.callspec.id}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"detector '{module}:One' could not be made, {said}"):
        load_detector(f"{module}:One")
