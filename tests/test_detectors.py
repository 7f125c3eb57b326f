"""The registry of detectors, a user's own class, and errors of wrong names."""

from __future__ import annotations

import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalenet_ray.core.errors import UserError
from scalenet_ray.models.detectors import canvas_of, declaration, load_detector
from tests.scripted_detector import Scripted, scripted

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


NAMES = {0: "person", 2: "car"}


@pytest.mark.parametrize(
    "declared",
    [
        NAMES,
        {"0": "person", "2": "car"},
        {" 2 ": "car", "0": "person"},
        {np.int64(0): "person", np.uint8(2): np.str_("car")},
        {0.0: "person", np.float32(2): "car"},
        {torch.tensor(0): "person", torch.tensor(2): "car"},
        UserDict(NAMES),
    ],
)
def test_class_ids_of_any_kind_are_whole_numbers(declared: Any) -> None:
    categories = declaration(scripted(categories=declared), "mine:Net").categories
    assert categories == NAMES
    assert {type(part) for pair in categories.items() for part in pair} == {int, str}


@pytest.mark.parametrize(
    "names", [["N/A", "person", "N/A"], ("N/A", "person", "N/A"), np.array(["N/A", "person", "N/A"])]
)
def test_classes_in_a_list_are_known_by_their_place(names: Any) -> None:
    assert declaration(scripted(categories=names), "mine:Net").categories == {0: "N/A", 1: "person", 2: "N/A"}


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"person": 0}, "class ids of detector 'mine:Net' must be whole numbers, got 'person'"),
        ({"1.5": "a"}, "must be whole numbers, got '1.5'"),
        ({"": "a"}, "must be whole numbers, got ''"),
        ({1.5: "a"}, "must be whole numbers, got 1.5"),
        ({True: "a"}, "must be whole numbers, got True"),
        ({None: "a"}, "must be whole numbers, got None"),
        ({float("nan"): "a"}, "must be whole numbers, got nan"),
        ({10**40: "a"}, "must be whole numbers, got 1000"),
        ({"1": "a", 1: "b"}, "must have each class id once, got twice 1"),
        ({0: "a", 1: None}, "name of class 1 of detector 'mine:Net' must be text, got None"),
        ({0: 7}, "name of class 0 of detector 'mine:Net' must be text, got 7"),
        ({0: "\udc00"}, "must be text"),
        ([{"id": 1, "name": "person"}], "must be text, got {"),
        ([], "must name at least one class, got none"),
        ({}, "must name at least one class, got none"),
        ("person", "must map class ids to names, or list the names, got str"),
        ({"person"}, "must map class ids to names, or list the names, got set"),
        (None, "must map class ids to names, or list the names, got NoneType"),
        (80, "must map class ids to names, or list the names, got int"),
    ],
)
def test_other_categories_are_refused_by_name(declared: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        declaration(scripted(categories=declared), "mine:Net")
    assert said in str(error.value)


@pytest.mark.parametrize("number", [lambda n: n, np.int16, np.float32, lambda n: np.array(n), torch.tensor, float])
def test_numbers_of_any_kind_are_declared(number: Any) -> None:
    info = declaration(scripted(input_side=number(64), iou_threshold=number(1)), "mine:Net")
    assert info[:2] == (64, 1.0)
    assert [type(part) for part in info[:2]] == [int, float]


NO_NUMBERS = [None, "64", True, np.bool_(True), float("nan"), float("inf"), -1, [64], np.array([64, 64]), 1j]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 64.5])
def test_a_side_that_is_no_number_of_pixels_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="input_side of detector 'mine:Net' must be a whole number of pixels, got"):
        declaration(scripted(input_side=value), "mine:Net")


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1.5])
def test_a_threshold_that_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="iou_threshold of detector 'mine:Net' must be between 0 and 1, got"):
        declaration(scripted(iou_threshold=value), "mine:Net")


@pytest.mark.parametrize("sides", [(64, 96), [64, 96], np.array([64, 96]), torch.tensor([64, 96]), (64.0, np.int8(96))])
def test_a_canvas_is_two_whole_numbers_of_any_kind(sides: Any) -> None:
    canvas = canvas_of(scripted(canvas=lambda hw: sides), (48, 96), "mine:Net")
    assert canvas == (64, 96)
    assert {type(side) for side in canvas} == {int}


@pytest.mark.parametrize(
    "sides", [64, None, (64,), (64, 96, 3), (64.5, 96), ("64", "96"), (None, 96), (float("nan"), 96)]
)
def test_a_canvas_of_another_form_is_refused(sides: Any) -> None:
    with pytest.raises(UserError, match="canvas_hw of detector 'mine:Net' must"):
        declaration(scripted(canvas=lambda hw: sides), "mine:Net")


def test_a_canvas_smaller_than_its_tile_is_refused() -> None:
    detector = scripted(canvas=lambda hw: (64, 64))
    with pytest.raises(UserError, match="got 64 x 64 for a tile of 64 x 96: a detector that shrinks its tiles undoes"):
        canvas_of(detector, (64, 96), "mine:Net")


def test_a_class_in_place_of_a_detector_is_refused() -> None:
    with pytest.raises(UserError, match="must be an object that can be called, got type: make one of it"):
        declaration(Scripted, "Scripted")


def test_a_class_that_is_not_there_is_named(own_module: str) -> None:
    with pytest.raises(ValueError, match="must have a class 'Absent'"):
        load_detector(f"{own_module}:Absent")


@pytest.mark.parametrize(
    "spec", ["yolo-onnx:net.onnx", "net.onnx", "yolox-onnx:", "yolox-onnx", "absent_module:Class", "absent.part:Class"]
)
def test_an_unknown_kind_is_told_the_known_ones(spec: str) -> None:
    kinds = "onnx, tiny, torchvision, transformers, ultralytics, yolox-onnx"
    wanted = f"kind:what with a kind of {kinds}, or module:Class of your own, got"
    with pytest.raises(ValueError, match=f"{wanted} '{spec}'"):
        load_detector(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "tiny:{}.safetensors",
        "torchvision:{}.pth",
        "torchvision:fcos_resnet50_fpn@{}.pth",
        "yolox-onnx:{}.onnx",
        "onnx:{}.onnx",
    ],
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
    with pytest.raises(
        ValueError, match="kind of half, onnx, their-net, tiny, torchvision, transformers, ultralytics, yolox-onnx"
    ):
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


# --- what others' code raises -------------------------------------------------------------------------------
RAISED = "detector 'unmade:Mine' could not be made, it raised"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Mine:\n    def __init__(self):\n        raise KeyError('a')", rf"{RAISED} KeyError: 'a' .*line 3\)"),
        ("import no_such", rf"{RAISED} ModuleNotFoundError: No module named 'no_such' .*line 1\)"),
        ("1 / 0", rf"{RAISED} ZeroDivisionError: division by zero .*line 1\)"),
        ("class Mine:\n    def", f"{RAISED} SyntaxError: invalid syntax"),
        ("import sys\nclass Mine:\n    def __init__(self): sys.exit(3)", f"{RAISED} SystemExit: 3"),
        ("class Mine:\n    @property\n    def categories(self): raise ValueError('no names')", "ValueError: no names"),
        ("class Mine:\n    def __init__(self, weights): ...", "got one with missing a required argument: 'weights'"),
        ("def Mine(pixels): ...", "got one with missing a required argument: 'pixels'"),
    ],
)
def test_what_an_own_class_raises_while_it_is_made_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "unmade.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unmade", raising=False)
    with pytest.raises(UserError, match=said):
        load_detector("unmade:Mine")


# --- what own classes and functions are called with ----------------------------------------------------------


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, **settings: Any) -> Any:
    """Load `name` of a module with the class Whole and some text; its call is recorded as `made_with`."""
    (folder / "of_mine.py").write_text(OWN + text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "of_mine", raising=False)
    return load_detector(f"of_mine:{name}", **settings)


TAKES = """
class Taking(Whole):
    def __init__(self, {}):
        self.made_with = {{name: value for name, value in locals().items() if name not in ("self", "__class__")}}
"""
GIVEN: dict[str, Any] = {"device": "cuda:1", "score_threshold": 0.2}


@pytest.mark.parametrize(
    ("parameters", "name", "made_with"),
    [
        ("weights", "Taking@net.pt", {"weights": "net.pt"}),
        ("device, path='x'", "Taking@net.pt", {"path": "net.pt", "device": "cuda:1"}),
        ("weights='mine.pt', *, device='cpu'", "Taking", {"weights": "mine.pt", "device": "cuda:1"}),
        ("weights=None, score_threshold=0.5", "Taking@a@b:c.pt", {"weights": "a@b:c.pt", "score_threshold": 0.2}),
        ("iou_threshold=0.6", "Taking", {"iou_threshold": 0.6}),
        ("iou_threshold", "Taking", {"iou_threshold": None}),
        ("mixed_precision=True", "Taking", {"mixed_precision": False}),
        ("**settings", "Taking", {"settings": {}}),
    ],
)
def test_a_class_gets_what_it_takes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: str, name: str, made_with: dict[str, Any]
) -> None:
    assert own(tmp_path, monkeypatch, TAKES.format(parameters), name, **GIVEN).made_with == made_with


def test_a_function_makes_a_detector_and_an_object_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        TAKES.format("weights, device") + "def make(path, device):\n    return Taking(path, device)\nready = Whole()\n"
    )
    made = own(tmp_path, monkeypatch, text, "make@net.pt", **GIVEN)
    assert made.made_with == {"weights": "net.pt", "device": "cuda:1"}
    assert own(tmp_path, monkeypatch, text, "ready").categories == {7: "thing"}
    with pytest.raises(UserError, match=r"must name a class or a function to take 'net.pt', got an object"):
        own(tmp_path, monkeypatch, text, "ready@net.pt")


def test_an_argument_that_nothing_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'of_mine:Whole@net.pt' must take an argument for 'net.pt', got none but"):
        own(tmp_path, monkeypatch, "", "Whole@net.pt")
    with pytest.raises(UserError, match=r"got one with missing a required argument: 'size': give its other"):
        own(tmp_path, monkeypatch, TAKES.format("weights, size"), "Taking@net.pt")


def test_mixed_precision_is_for_own_classes_that_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TAKES.format("mixed_precision=False")
    assert own(tmp_path, monkeypatch, text, "Taking", mixed_precision=True).made_with == {"mixed_precision": True}


def test_a_canvas_that_no_machine_has_is_refused() -> None:
    with pytest.raises(UserError, match="must be at most 32768 pixels a side, got 1000000000000"):
        declaration(scripted(canvas=lambda hw: (10**12, 10**12)), "mine:Net")
