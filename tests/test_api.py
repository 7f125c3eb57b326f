"""Prediction on one image, with the interface of SAHI's get_sliced_prediction."""

from __future__ import annotations

import io
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scalenet_ray
from scalenet_ray.api import ScaledPrediction
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.recursion import recursive_detect
from tests.oracles import CATEGORIES, FailingDetector, PerfectDetector, TruthOfSquares, clustered_squares, draw_squares

SIDE = 128
BOXES, LABELS = clustered_squares(2, (SIDE, SIDE), (7, 9), 4, extent=44)
SCENE = draw_squares((SIDE, SIDE), BOXES, LABELS)
DETECTOR = PerfectDetector(12, input_side=SIDE)
NET = OracleScalePredictor(TruthOfSquares({0: BOXES}))


def predict(image: Any = SCENE, detector: Any = DETECTOR, **arguments: Any) -> ScaledPrediction:
    return scalenet_ray.get_scaled_prediction(image, detector, **({"scale_net": NET, "verbose": 0} | arguments))


def test_it_finds_what_the_reference_finds() -> None:
    prediction = predict()
    policy = parse_policy("scalenet", input_side=SIDE, iou_threshold=DETECTOR.iou_threshold)
    assert prediction.policy == policy
    wanted = recursive_detect(SCENE, 0, policy, detect=DETECTOR, predict_scale=NET)
    np.testing.assert_array_equal(prediction.detections.boxes, wanted.detections.boxes)
    assert len(prediction.detections) == len(BOXES)
    assert len(prediction.found_in_whole_image(0.3)) == 0
    assert prediction.detector_passes == wanted.detector_passes


def test_objects_are_read_as_sahi_users_read_them() -> None:
    prediction = predict()
    assert (prediction.image_width, prediction.image_height) == prediction.image.size == (SIDE, SIDE)
    one = prediction.object_prediction_list[0]
    assert one.category.name == CATEGORIES[one.category.id]
    assert one.score.value == pytest.approx(float(prediction.detections.scores[0]))
    assert one.bbox.to_xyxy() == pytest.approx([one.bbox.minx, one.bbox.miny, one.bbox.maxx, one.bbox.maxy])
    assert one.depth == 1
    assert prediction.durations_in_seconds["prediction"] > 0


def test_coco_predictions_carry_scores_and_annotations_do_not() -> None:
    prediction = predict()
    rows = prediction.to_coco_predictions(image_id=17)
    box = prediction.detections.boxes[0].astype(float)
    assert rows[0]["image_id"] == 17
    assert rows[0]["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]], abs=1e-3)
    assert rows[0]["area"] == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), abs=1e-2)
    assert rows[0]["category_name"] == CATEGORIES[rows[0]["category_id"]]
    annotation = prediction.to_coco_annotations()[0]
    assert "score" not in annotation
    assert annotation | {"image_id": 17, "score": rows[0]["score"]} == rows[0]


def test_visuals_are_the_image_at_its_own_size_with_boxes(tmp_path: Path) -> None:
    path = predict().export_visuals(str(tmp_path / "out"), file_name="seen", hide_labels=True)
    with Image.open(path) as picture:
        drawn = np.asarray(picture.convert("RGB"))
    assert path == str(tmp_path / "out" / "seen.png")
    assert drawn.shape == SCENE.shape
    # The colour of what the recursion found, somewhere on the side of each of its boxes.
    orange = (np.abs(drawn.astype(int) - (230, 159, 0)).max(axis=2) < 40).sum()
    assert orange > 4 * 4 * 5


def test_images_come_as_addresses_arrays_or_pillow(tmp_path: Path) -> None:
    picture = Image.fromarray(SCENE)
    picture.save(tmp_path / "scene.png")
    wanted = predict().detections.boxes
    for image in (tmp_path / "scene.png", str(tmp_path / "scene.png"), picture, picture.convert("RGBA")):
        np.testing.assert_array_equal(predict(image).detections.boxes, wanted)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(stored, "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(stored.getvalue())
    assert predict(tmp_path / "turned.jpg", policy="whole").pixels.shape == (40, 20, 3)


@pytest.mark.parametrize("image", [SCENE[..., 0], SCENE.astype(np.float32), np.zeros((0, 4, 3), np.uint8)])
def test_an_array_of_another_kind_is_told_what_is_wanted(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"an image must be \[h, w, 3\] uint8 RGB, got shape"):
        predict(image)


def test_without_a_scale_net_the_first_pass_says_where_to_look() -> None:
    unsure = PerfectDetector(3, sure_side=12, input_side=SIDE)
    assert predict(detector=unsure, scale_net=None).policy.name == "regions"
    prediction = predict(detector=unsure, scale_net=None, policy="first-pass")
    assert len(prediction.detections) == len(BOXES)
    assert predict(detector=unsure, scale_net=None, policy="whole").object_prediction_list == []


def test_a_policy_may_be_given_whole() -> None:
    policy = replace(parse_policy("grid-2", input_side=SIDE, iou_threshold=0.5), grid=4)
    assert len(predict(policy=policy).steps) == 17


def test_excluded_categories_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {one.category.name for one in predict().object_prediction_list}
    left = predict(exclude_classes_by_name=[sorted(names)[0]]).object_prediction_list
    assert {one.category.name for one in left} == names - {sorted(names)[0]}
    assert predict(exclude_classes_by_id=list(CATEGORIES)).object_prediction_list == []
    one = sorted(names)[0]
    left = predict(exclude_classes_by_name=one).object_prediction_list
    assert {found.category.name for found in left} == names - {one}
    # Before the work.
    monkeypatch.setattr("scalenet_ray.api.scaled_prediction.recursive_detect", None)
    with pytest.raises(ValueError, match="among the detector's 3 categories, got zebra"):
        predict(exclude_classes_by_name=["zebra"])


def test_suppression_may_ask_no_class() -> None:
    class TwoMinded(PerfectDetector):
        def __call__(self, pixels: Any) -> Any:
            return [scalenet_ray.Detections(np.tile([[10, 10, 40, 40]], (2, 1)), [0.9, 0.8], [1, 2]) for _ in pixels]

    detector = TwoMinded(input_side=SIDE)
    assert len(predict(detector=detector, policy="whole").detections) == 2
    assert predict(detector=detector, policy="whole", postprocess_class_agnostic=True).detections.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slice_height": 512, "slice_width": 256}, ValueError, "slices are squares, got 512 and 256"),
        ({"slice_height": 512, "policy": "whole"}, ValueError, "got policy 'whole' too: leave one out"),
        ({"slice_height": 0}, ValueError, "slice_side must be 16 image pixels or more, got 0"),
        (
            {"slice_height": 32, "overlap_height_ratio": 0.2, "overlap_width_ratio": 0.5},
            ValueError,
            "overlap ratios must have equal height and",
        ),
        ({"overlap_height_ratio": 0.5, "policy": "whole"}, ValueError, "overlap ratios are of slices, got them with"),
        (
            {"smallest_object": 8.0, "policy": "whole"},
            ValueError,
            "a smallest object is for regions, got",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"confidence_threshold": 30}, ValueError, "between 0 and 1, got 30: divide percentages by 100"),
        ({"confidence_threshold": float("nan")}, ValueError, "confidence_threshold must be between 0 and 1, got nan"),
        ({"image": [SCENE]}, ValueError, r"image must be an address, .* got list: .* give many images to detect"),
        ({"slices": 8}, TypeError, "unexpected keyword argument 'slices'$"),
        ({"perform_standard_pred": False}, ValueError, "perform_standard_pred must be True"),
        ({"postprocess_type": "GREEDYNMM"}, ValueError, "postprocess_type must be CONSENSUS, NMS, .* got 'GREEDYNMM'"),
        ({"postprocess_match_metric": "IOS"}, ValueError, "must be IOU, got 'IOS'"),
        ({"policy": "oracle"}, ValueError, "policy oracle reads the ground truth"),
        ({"policy": "magic"}, ValueError, "there is no policy 'magic'"),
    ],
)
def test_what_means_nothing_here_is_refused_with_what_to_do(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predict(**arguments)


def test_a_detector_that_lacks_a_part_is_told_which() -> None:
    with pytest.raises(ValueError, match=r"detector 'Mine' must have .* lacks canvas_hw"):
        predict(detector=type("Mine", (), {"input_side": 1, "categories": {}, "iou_threshold": 1, "__call__": print})())


def test_an_image_that_the_detector_breaks_on_says_so() -> None:
    breaking = FailingDetector(DETECTOR)
    scene = draw_squares((SIDE, SIDE), np.array([[4, 4, 40, 40]]), np.array([1]))
    scene[4:40, 4:40] = (255, 0, 255)
    with pytest.raises(ValueError, match=r"could not be worked on \(detect\)"):
        predict(scene, breaking, policy="whole")


def test_it_says_as_much_as_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    predict(verbose=0)
    assert capsys.readouterr().out == ""
    predict(verbose=1)
    assert capsys.readouterr().out == f"scalenet: {len(BOXES)} objects, 3 tiles, 3.00 detector passes\n"
    predict(verbose=2)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["tile", "whole", "0", "1", "scalenet:"]


def test_supervision_gets_its_own_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("supervision")
    stand_in.Detections = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    prediction = predict(detector=PerfectDetector(12, input_side=SIDE, with_masks=True))
    given: Any = prediction.to_supervision()
    np.testing.assert_array_equal(given.xyxy, prediction.detections.boxes)
    assert given.class_id.tolist() == prediction.detections.labels.tolist()
    assert given.data["class_name"].tolist() == [one.category.name for one in prediction.object_prediction_list]
    assert given.mask.shape == (len(BOXES), SIDE, SIDE)
    x0, y0, x1, y1 = BOXES[np.argmin(np.abs(BOXES - given.xyxy[0]).sum(axis=1))].astype(int)
    assert given.mask[0, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].all()
    assert given.mask[0].sum() <= (x1 - x0 + 2) * (y1 - y0 + 2)


def test_without_supervision_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="needs the package supervision, which is not installed"):
        predict().to_supervision()
