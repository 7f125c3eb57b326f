"""Detectors of callbacks in supervision's form, and of SAHI's models: frames, colours, masks, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from scalenet_ray import UserError, get_scaled_prediction, load_detector, wrap_sahi, wrap_supervision
from scalenet_ray.core.detections import Detections
from tests.job_scripts import REPOSITORY
from tests.oracles import PerfectDetector, detections, draw_squares
from tests.test_torchvision_detectors import make_tiles

NAMES = ["N/A", "square", "disc"]
TILE = draw_squares((60, 100), np.array([[8, 8, 40, 44], [50, 12, 90, 50]]), [1, 2])


def answer(boxes: Any, scores: Any, labels: Any, mask: Any = None) -> Any:
    """What supervision's Detections has, as plain arrays."""
    confidence, classes = np.array(scores, np.float32), np.array(labels, int)
    return SimpleNamespace(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4), confidence=confidence, class_id=classes, mask=mask
    )


def perfect(picture: np.ndarray) -> Any:
    (found,) = PerfectDetector()([picture])
    return answer(found.boxes, found.scores, found.labels)


def test_a_callback_finds_what_it_finds_in_the_padded_tile() -> None:
    detector = wrap_supervision(perfect, NAMES, input_side=128, colours="RGB")
    (found,) = detections(detector([TILE]))
    (wanted,) = detections(PerfectDetector()([TILE]))
    np.testing.assert_allclose(found.boxes, wanted.boxes)
    assert found.labels.tolist() == wanted.labels.tolist()
    assert found.masks is None


@pytest.mark.parametrize(("colours", "turned"), [("RGB", False), ("BGR", True)])
def test_a_callback_sees_tiles_on_a_grey_square_in_its_order_of_colours(colours: Any, turned: bool) -> None:
    seen: list[np.ndarray] = []

    def callback(picture: np.ndarray) -> Any:
        seen.append(picture)
        return answer([], [], [])

    tiles = make_tiles((40, 64), (64, 20))
    found = detections(wrap_supervision(callback, NAMES, input_side=64, colours=colours)(tiles))
    assert [len(each) for each in found] == [0, 0]
    for picture, tile in zip(seen, tiles, strict=True):
        height, width = tile.shape[:2]
        assert picture.shape == (64, 64, 3)
        assert picture.flags.c_contiguous
        assert np.array_equal(picture[:height, :width], tile[..., ::-1] if turned else tile)
        assert (picture[height:] == 114).all()
        assert (picture[:, width:] == 114).all()


def test_boxes_and_masks_are_cut_at_the_tile() -> None:
    mask = np.zeros((3, 64, 64), bool)
    mask[0, 10:50, 5:25] = mask[1, 45:, :] = mask[2, :8, :8] = True
    boxes = [[5, 10, 25, 50], [0, 45, 64, 64], [-3, -2, 8, 8]]
    detector = wrap_supervision(lambda _: answer(boxes, [0.9, 0.8, 0.7], [1, 1, 2], mask), NAMES, input_side=64)
    (found,) = detections(detector(make_tiles((40, 30))))
    assert found.boxes.tolist() == [[5, 10, 25, 40], [0, 0, 8, 8]]
    assert found.labels.tolist() == [1, 2]
    assert found.masks is not None
    shown = [coco_mask.decode({"size": [40, 30], "counts": counts}) for counts in found.masks]
    assert np.array_equal(shown[0], mask[0, :40, :30])
    assert np.array_equal(shown[1], mask[2, :40, :30])


def test_a_tile_larger_than_the_canvas_is_refused() -> None:
    detector = wrap_supervision(perfect, NAMES, input_side=64)
    assert detector.canvas_hw((64, 3)) == (64, 64)
    with pytest.raises(UserError, match="tiles of at most 64 or wrap it with a larger input_side"):
        detector.canvas_hw((65, 10))


def test_a_wrapped_callback_is_used_by_name_and_as_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrapped_by_me.py").write_text(
        "from scalenet_ray import wrap_supervision\nfrom tests.test_wrapped_detectors import NAMES, perfect\n"
        "detector = wrap_supervision(perfect, NAMES, input_side=128, colours='RGB')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    named = load_detector("wrapped_by_me:detector")
    for detector in (named, wrap_supervision(perfect, NAMES, input_side=128, colours="RGB")):
        found = get_scaled_prediction(TILE, detector, policy="grid-2").object_prediction_list
        assert sorted(each.category.name for each in found) == ["disc", "square"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wrap_supervision(None, NAMES), "takes a callback(picture) -> Detections, got NoneType"),  # type: ignore[arg-type]
        (lambda: wrap_supervision(perfect, NAMES, colours="rgb"), "colours must be RGB or BGR, got 'rgb'"),  # type: ignore[arg-type]
        (
            lambda: wrap_supervision(lambda _: None, NAMES)(make_tiles((8, 8))),
            "supervision.Detections with xyxy, confidence, class_id, got NoneType without xyxy, confidence, class_id",
        ),
        (
            lambda: wrap_supervision(lambda _: SimpleNamespace(xyxy=[[0, 0, 4, 4]], confidence=[1.0]), NAMES)(
                make_tiles((8, 8))
            ),
            "got SimpleNamespace without class_id: set them",
        ),
        (lambda: wrap_sahi(perfect), "takes a model of AutoDetectionModel.from_pretrained, got function"),
        (lambda: wrap_sahi(Model(image_size=None)), "got none: give image_size to it"),
        (lambda: wrap_sahi(Model(category_mapping=None)), "got none: give category_mapping to it"),
    ],
)
def test_what_can_not_be_wrapped_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value)


class Model:
    """A model with the members of SAHI's DetectionModel, which finds squares."""

    def __init__(self, **parts: Any) -> None:
        self.image_size = 128
        self.confidence_threshold = 0.3
        self.category_mapping = {"1": "square", "2": "disc"}
        self.object_prediction_list: list[Any] = []
        self.with_masks = False
        vars(self).update(parts)

    def perform_inference(self, image: np.ndarray) -> None:
        self._picture = image

    def convert_original_predictions(self, shift_amount: list[int], full_shape: list[int]) -> None:
        assert shift_amount == [0, 0]
        assert tuple(full_shape) == self._picture.shape[:2]
        (found,) = PerfectDetector()([self._picture])
        self.object_prediction_list = [
            SimpleNamespace(
                bbox=SimpleNamespace(to_xyxy=box.tolist),
                score=SimpleNamespace(value=float(score)),
                category=SimpleNamespace(id=int(label)),
                mask=SimpleNamespace(bool_mask=self._mask(box)) if self.with_masks else None,
            )
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
            if score >= self.confidence_threshold
        ]

    def _mask(self, box: np.ndarray) -> np.ndarray:
        mask = np.zeros(self._picture.shape[:2], bool)
        mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return mask


def test_a_sahi_model_finds_what_it_finds_in_the_padded_tile() -> None:
    model = Model()
    detector = wrap_sahi(model)
    (found,) = detections(detector([TILE]))
    (wanted,) = detections(PerfectDetector()([TILE]))
    np.testing.assert_allclose(found.boxes, wanted.boxes)
    assert found.labels.tolist() == wanted.labels.tolist()
    assert detector.categories == {1: "square", 2: "disc"}
    assert detector.input_side == 128
    assert model.confidence_threshold == 0.01


def test_a_sahi_model_may_give_masks_or_nothing() -> None:
    (found,) = detections(wrap_sahi(Model(with_masks=True))([TILE]))
    assert found.masks is not None
    areas = [coco_mask.decode({"size": [60, 100], "counts": counts}).sum() for counts in found.masks]
    np.testing.assert_allclose(areas, found.areas, rtol=0.1)
    (nothing,) = detections(wrap_sahi(Model())([np.zeros((30, 30, 3), np.uint8)]))
    assert len(nothing) == 0


# --- the libraries themselves ---------------------------------------------------------------------------

PEERS = "`make bench` installs it into .venv/peers: put that on PYTHONPATH"


def test_supervisions_own_detections_are_read() -> None:
    supervision = pytest.importorskip("supervision", reason=PEERS)

    def callback(picture: np.ndarray) -> Any:
        (found,) = PerfectDetector()([picture])
        mask = np.ones((len(found), *picture.shape[:2]), bool)
        return supervision.Detections(xyxy=found.boxes, confidence=found.scores, class_id=found.labels, mask=mask)

    detector = wrap_supervision(callback, NAMES, input_side=128, colours="RGB")
    (found,), (wanted,) = detections(detector([TILE])), detections(PerfectDetector()([TILE]))
    np.testing.assert_allclose(found.boxes, wanted.boxes)
    assert found.masks is not None
    assert len(detections(detector([np.zeros((30, 30, 3), np.uint8)]))[0]) == 0
    empty = wrap_supervision(lambda _: supervision.Detections.empty(), NAMES, input_side=128)
    assert len(detections(empty([TILE]))[0]) == 0


def test_supervision_draws_a_result_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervision = pytest.importorskip("supervision", reason=PEERS)
    page = (REPOSITORY / "docs" / "how_to" / "python.md").read_text()
    (block,) = re.findall(r"```python\n(import supervision as sv\n.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pixels = draw_squares((400, 640), np.array([[40, 60, 160, 180], [300, 200, 500, 360]]), [1, 2])
    result = get_scaled_prediction(pixels, PerfectDetector(input_side=640), policy="whole")
    exec(block, {"result": result})
    with Image.open("annotated.png") as picture:
        drawn = np.asarray(picture)
    assert drawn.shape == pixels.shape
    assert len(result.detections) == 2
    for box, label in zip(result.detections.boxes.round().astype(int).tolist(), result.detections.labels, strict=True):
        x0, _, x1, y1 = box
        # Red would be blue if supervision took the pixels for BGR.
        colour = supervision.ColorPalette.DEFAULT.by_idx(int(label)).as_rgb()
        assert (drawn[y1 - 1 : y1 + 2, x0:x1] == colour).all(axis=2).any(axis=0).all()
        inside = np.s_[y1 - 20 : y1 - 3, x0 + 3 : x1 - 3]
        np.testing.assert_array_equal(drawn[inside], pixels[inside])


@pytest.mark.filterwarnings("ignore")
def test_sahis_own_torchvision_model_is_not_resized() -> None:
    sahi = pytest.importorskip("sahi", reason=PEERS)
    from tests.test_torchvision_detectors import SMALL_RCNN, lively_model

    network = lively_model(SMALL_RCNN)
    model = sahi.AutoDetectionModel.from_pretrained(
        model_type="torchvision", model=network, image_size=128, category_mapping={"1": "cat", "2": "dog"}, device="cpu"
    )
    seen: list[Any] = []
    network.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape)))
    (found,) = detections(wrap_sahi(model)(make_tiles((64, 100))))
    assert seen == [(1, 3, 128, 128)]
    assert isinstance(found, Detections)
    assert len(found)
