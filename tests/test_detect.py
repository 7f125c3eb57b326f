"""Detection in many images from Python."""

from __future__ import annotations

import inspect
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import scalenet_ray
from scalenet_ray.api.many import _Settings
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.inference import OracleScalePredictor
from scalenet_ray.runs.folder import RunFolder
from tests.bad_files import encoded
from tests.oracles import CATEGORIES, PerfectDetector, TruthOfSquares, clustered_squares, draw_squares

SIDE = 128
DETECTOR = PerfectDetector(5, input_side=SIDE)
SQUARES = [clustered_squares(seed, (SIDE, SIDE), (7, 9), 4, extent=44) for seed in range(4)]
SCENES = [draw_squares((SIDE, SIDE), boxes, labels) for boxes, labels in SQUARES]
COUNTS = [len(labels) for _, labels in SQUARES]


detect = partial(scalenet_ray.detect, engine="local")
"""In this process, where Ray may run for other tests."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the scenes as PNG files."""
    (tmp_path / "images").mkdir()
    for i, scene in enumerate(SCENES):
        Image.fromarray(scene).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def found(predictions: Any) -> list[tuple[str, list[list[float]]]]:
    return [(prediction.source, prediction.detections.boxes.tolist()) for prediction in predictions]


def test_a_folder_gives_what_each_image_gives_alone(folder: Path) -> None:
    predictions = detect(folder, DETECTOR)
    assert predictions.total == 4
    for i, (prediction, scene) in enumerate(zip(predictions, SCENES, strict=True)):
        alone = scalenet_ray.get_scaled_prediction(scene, DETECTOR, verbose=0)
        assert prediction.source == str(folder / f"{i}.png")
        assert len(prediction.detections) == COUNTS[i]
        np.testing.assert_array_equal(prediction.detections.boxes, alone.detections.boxes)
        assert prediction.image_hw == (SIDE, SIDE)
        np.testing.assert_array_equal(prediction.pixels, scene)


@pytest.mark.parametrize(
    "kind", ["arrays", "pillow", "bytes", "addresses", "rows", "undecoded rows", "tuples", "torch"]
)
def test_every_way_to_hand_over_images_finds_the_same(folder: Path, kind: str) -> None:
    files = [folder / f"{i}.png" for i in range(4)]

    class TorchDataset:
        """Has a length and items, and no iterator."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, position: int) -> tuple[Image.Image, int]:
            return Image.fromarray(SCENES[position]), position

    images: Any = {
        "arrays": SCENES,
        "pillow": (Image.fromarray(scene) for scene in SCENES),
        "bytes": [encoded(scene) for scene in SCENES],
        "addresses": files,
        "rows": [{"image": scene, "site": i} for i, scene in enumerate(SCENES)],
        "undecoded rows": [{"image": {"bytes": encoded(scene), "path": None}} for scene in SCENES],
        "tuples": [(scene, 1) for scene in SCENES],
        "torch": TorchDataset(),
    }[kind]
    predictions = list(detect(images, DETECTOR))
    wanted = found(detect(folder, DETECTOR))
    assert [boxes for _, boxes in found(predictions)] == [boxes for _, boxes in wanted]
    if kind != "addresses":
        assert [prediction.source for prediction in predictions] == [f"image {i}" for i in range(4)]
    if kind == "rows":
        assert [prediction.row for prediction in predictions] == [{"site": i} for i in range(4)]


def test_one_image_is_a_list_of_one() -> None:
    assert repr(detect(SCENES[0], DETECTOR)) == "Predictions(1 image)"
    (prediction,) = detect(SCENES[0], DETECTOR)
    assert len(prediction.detections) == COUNTS[0]


def test_a_bad_image_costs_itself_alone(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"no image")
    predictions = list(detect(folder, DETECTOR))
    assert [prediction.failure is None for prediction in predictions] == [True, True, False, True]
    assert predictions[2].failure is not None
    assert predictions[2].failure.stage == "read"
    assert "failed:" in repr(predictions[2])


def test_very_many_windows_are_said_before_the_work_and_too_many_refused(folder: Path, monkeypatch: Any) -> None:
    with pytest.warns(UserWarning, match="policy slices@16 cuts 100 windows of an image of 128 x 128 pixels, such as"):
        detect(folder, DETECTOR, policy="slices@16")
    monkeypatch.setattr("scalenet_ray.core.windows.MOST_WINDOWS", 99)
    with pytest.raises(UserError, match="policy slices@16 may cut 99 windows of an image, got 100 for 128 x 128"):
        detect(folder, DETECTOR, policy="slices@16")
    small = np.ascontiguousarray(SCENES[0][:64])
    large, cut = detect([SCENES[0], small], DETECTOR, policy="slices@16")
    assert large.failure is not None
    assert large.failure.reason.startswith("policy slices@16 may cut 99 windows")
    assert cut.failure is None


def test_a_pillow_image_that_is_cut_short_costs_itself_alone() -> None:
    cut = Image.open(io.BytesIO(encoded(SCENES[0])[:-60]))
    broken, whole = detect([cut, SCENES[1]], DETECTOR)
    assert broken.failure is not None
    assert broken.failure.reason.startswith("the image cannot be decoded")
    assert len(whole.detections) == COUNTS[1]


def test_a_scale_net_object_and_a_policy_object_are_used() -> None:
    scene, net = SCENES[2], OracleScalePredictor(TruthOfSquares({1: SQUARES[2][0]}))
    policy = scalenet_ray.parse_policy("scalenet", input_side=SIDE, iou_threshold=DETECTOR.iou_threshold)
    near_sighted = PerfectDetector(12, input_side=SIDE)
    (prediction,) = detect([scene], near_sighted, policy=policy, scale_net=net)
    assert prediction.detections.depth.tolist() == [1] * COUNTS[2]


def test_classes_and_the_threshold_choose(folder: Path) -> None:
    red = [p.detections.labels.tolist() for p in detect(folder, DETECTOR, classes=["red"])]
    everything = [p.detections.labels.tolist() for p in detect(folder, DETECTOR)]
    assert red == [[label for label in labels if label == 1] for labels in everything]
    assert any(red)
    assert red == [p.detections.labels.tolist() for p in detect(folder, DETECTOR, classes="red")]
    assert not any(len(p.detections) for p in detect(folder, DETECTOR, confidence_threshold=0.99))


def test_the_run_folder_is_a_detection_run_and_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    predictions = detect(folder, DETECTOR, output=output)
    first = [next(predictions) for _ in range(2)]
    del predictions
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = list(detect(folder, DETECTOR, output=output, resume=True))
    assert found(resumed[:2]) == found(first)
    assert len(resumed) == 4
    assert {"metrics.json", "report.html", "results.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert found(resumed) == found(detect(folder, DETECTOR))
    assert found(detect(folder, DETECTOR, output=output, resume=True)) == found(resumed)
    # Before the detector is looked at.
    with pytest.raises(FileExistsError, match="holds a run already: add --resume"):
        detect(folder, "magic:detector", output=output)


@pytest.mark.parametrize("kept", [True, False])
def test_an_error_names_its_trace_only_where_the_folder_stays(
    folder: Path, tmp_path: Path, monkeypatch: Any, kept: bool
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("scalenet_ray.api.many.ImagePrediction", fail)
    output = str(tmp_path / "run") if kept else None
    with pytest.raises(RuntimeError, match="a bug") as raised:
        list(detect(folder, DETECTOR, output=output))
    assert getattr(raised.value, "__notes__", []) == ([f"its trace: {output}/error.txt"] if kept else [])


def test_the_page_follows_the_run_until_it_ends(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    page, again = tmp_path / "run" / "report.html", '<meta http-equiv="refresh"'
    monkeypatch.setattr("scalenet_ray.runs.batch._SECONDS_BETWEEN_REPORTS", 0)
    predictions = detect(folder, DETECTOR, output=str(tmp_path / "run"))
    next(predictions)
    assert again in page.read_text()
    assert "regions: 1/4 images" in page.read_text()
    del predictions
    assert again not in page.read_text()
    assert "The run has stopped" in page.read_text()
    list(detect(folder, DETECTOR, output=str(tmp_path / "run"), resume=True))
    assert again not in page.read_text()
    assert "What was found" in page.read_text()


def test_progress_is_reported(folder: Path) -> None:
    seen = []
    list(detect(folder, DETECTOR, progress=seen.append))
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (4, 4, 0)


@pytest.mark.parametrize("kind", ["folder", "addresses", "arrays"])
def test_of_each_so_many_the_first_is_taken_and_keeps_its_number(folder: Path, kind: str, tmp_path: Path) -> None:
    addresses = [str(path) for path in sorted(folder.iterdir())]
    images: Any = {"folder": folder, "addresses": iter(addresses), "arrays": SCENES}[kind]
    predictions = detect(images, DETECTOR, every=3, output=str(tmp_path / "run"))
    assert predictions.total == 2
    names = ["image 0", "image 3"] if kind == "arrays" else [addresses[0], addresses[3]]
    assert found(predictions) == [
        (name, boxes) for name, (_, boxes) in zip(names, found(detect([SCENES[0], SCENES[3]], DETECTOR)), strict=True)
    ]
    run = RunFolder(str(tmp_path / "run"))
    assert [(image.image_id, image.file_name) for image in run.finished("regions")] == [(1, names[0]), (4, names[1])]
    assert run.config()["settings"]["every"] == 3


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (3, {}, "images must be an address, an image, or an iterable of them, got int"),
        ([3], {}, "an image must be an address, .* got int as number 0"),
        (["a\udc80.jpg"], {}, r"names of files must be UTF-8, got .*udc80"),
        ([], {}, "images must hold at least one image, got none"),
        (
            pd.DataFrame({"path": ["a.jpg"]}),
            {},
            "must be rows, got a DataFrame of columns: give its to_dict",
        ),
        ([np.zeros((4, 4), np.uint8)], {}, r"an image must be \[h, w, 3\] uint8 RGB, got shape \[4, 4\]"),
        ([{"picture": SCENES[0]}], {}, "rows must have a column one of image, .* got picture: give column"),
        ([{"image": SCENES[0]}], {"column": "photo"}, "rows must have a column photo with the image, got image"),
        (SCENES, {"resume": True}, "got no output: leave resume out"),
        (SCENES, {"resume": True, "output": "runs/x"}, "got images without addresses: leave resume out"),
        (SCENES, {"classes": ["purple"]}, "purple"),
        (SCENES, {"classes": []}, "--classes must name at least one class, got none: leave it out for all"),
        (SCENES, {"confidence_threshold": 30}, "between 0 and 1, got 30: divide percentages by 100"),
        (SCENES, {"engine": "lokal"}, "engine must be ray or local, got 'lokal'"),
        (SCENES, {"every": 0}, "every must be 1, for all images, or more, got 0: 10 takes each tenth"),
        (SCENES, {"policy": "sideways"}, "sideways"),
        (SCENES, {"policy": "oracle"}, "policy oracle reads the ground truth"),
        (SCENES, {"policy": "whole", "smallest_object": 3.0}, "a smallest object is for regions"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(images: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect(images, DETECTOR, **arguments)


def test_a_prediction_gives_crops_pictures_and_one_line(folder: Path, tmp_path: Path) -> None:
    prediction = next(detect(folder, DETECTOR))
    assert repr(prediction).startswith(f"ImagePrediction({folder / '0.png'}: {COUNTS[0]} objects: ")
    for crop, box, label in zip(
        prediction.crops(), prediction.detections.boxes, prediction.detections.labels, strict=True
    ):
        width, height = box[2:] - box[:2]
        assert abs(crop.shape[0] - height) <= 2
        assert abs(crop.shape[1] - width) <= 2
        middle = crop[crop.shape[0] // 2, crop.shape[1] // 2]
        assert ["red", "green", "blue"][middle.argmax()] == CATEGORIES[label]
    with pytest.raises(UserError, match="margin must be 0 or more"):
        prediction.crops(margin=-0.9)
    for size in ({"text_size": -5}, {"line_width": 0}, {"line_width": 2.5}, {"text_size": 10**6}):
        with pytest.raises(UserError, match=r"must be 1 to 1000 whole pixels, or None .*, got (-5|0|2.5|1000000)"):
            prediction.plot(**size)  # type: ignore[arg-type]
    wider = prediction.crops(margin=0.5)
    assert all(more.size > less.size for more, less in zip(wider, prediction.crops(), strict=True))
    assert Image.open(io.BytesIO(prediction._repr_png_())).size == (SIDE, SIDE)
    written = prediction.export_visuals(str(tmp_path), file_name="drawn", export_format="jpg")
    with Image.open(written) as picture:
        assert picture.format == "JPEG"
    with pytest.raises(UserError, match=r"a format that Pillow writes, .*, got 'tuff': give another"):
        prediction.export_visuals(str(tmp_path), export_format="tuff")


@pytest.mark.ray
def test_on_ray_it_finds_the_same_in_arrays_and_data_sets(ray_session: None) -> None:
    import ray.data

    wanted = {boxes.__repr__() for _, boxes in found(scalenet_ray.detect(SCENES, DETECTOR, engine="local"))}
    on_ray = scalenet_ray.detect(SCENES, DETECTOR)
    assert {boxes.__repr__() for _, boxes in found(on_ray)} == wanted
    rows = ray.data.from_items([{"image": encoded(scene), "site": i} for i, scene in enumerate(SCENES)])
    objects = scalenet_ray.detect(rows, DETECTOR, as_dataset=True)
    table = objects.to_pandas().sort_values(["site", "score"])
    assert set(table.columns) == {"site", "source", "category", "score", "x0", "y0", "x1", "y1", "depth"}
    assert table.groupby("site").size().tolist() == COUNTS


@pytest.mark.ray
def test_columns_of_rows_are_not_overwritten(ray_session: None) -> None:
    predictions = detect([{"image": SCENES[0], "score": 3, "site": 1, "source": "here"}], DETECTOR)
    with pytest.raises(UserError, match=r"columns of rows must have other names .*, got source, score: rename them"):
        predictions.to_dataset()
    assert [prediction.row["score"] for prediction in predictions] == [3]


def test_both_forms_of_the_result_take_the_same_arguments() -> None:
    parameters = inspect.signature(scalenet_ray.detect).parameters.keys()
    assert parameters - _Settings.__annotations__.keys() == {"images", "detector", "as_dataset"}


@pytest.mark.ray
def test_a_data_set_of_objects_warns_of_images_that_failed(ray_session: None) -> None:
    with pytest.warns(UserWarning, match="1 of 2 images failed and have no rows, the first is .*image 1: failed"):
        objects = scalenet_ray.detect([SCENES[0], b"no image"], DETECTOR, engine="local").to_dataset()
    assert objects.count() == COUNTS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = scalenet_ray.detect([np.zeros_like(SCENES[0])], DETECTOR, engine="local").to_dataset()
    assert empty.count() == 0
