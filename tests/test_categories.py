"""The choice of a data set's categories: names, classes, what the detector does not know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.categories import CategoryChoice, choose_categories, classes_named, with_chosen
from scalenet_ray.models.spec import SAMPLE_DETECTOR
from tests.job_scripts import run_command

STREET = {4: "Pedestrian", 2: "people", 7: "car", 9: "tram"}
COCO = {1: "person", 3: "car", 8: "truck"}


def test_several_names_become_one_class_with_the_id_of_the_first() -> None:
    choice = CategoryChoice(category_map=("pedestrian=person", "people = person"), ignore_unknown=True)
    chosen = choose_categories(STREET, COCO, choice)
    assert chosen.ids == {4: 4, 2: 4, 7: 7}
    assert chosen.categories == {4: "person", 7: "car"}
    assert chosen.in_words() == (
        "categories: used person, car; renamed Pedestrian -> person, people -> person; left out tram"
    )


def test_classes_are_named_as_the_detector_names_them() -> None:
    choice = CategoryChoice(category_map=("people=person",), classes=("PERSON",))
    chosen = choose_categories(STREET, COCO, choice)
    assert chosen.categories == {2: "person"}
    assert chosen.left_out == ("Pedestrian", "car", "tram")


def test_what_the_detector_does_not_know_stays_unless_it_is_to_be_ignored() -> None:
    chosen = choose_categories(STREET, COCO, CategoryChoice(classes=("car", "tram")))
    assert chosen.categories == {7: "car", 9: "tram"}
    ignoring = choose_categories(STREET, COCO, CategoryChoice(classes=("car", "tram"), ignore_unknown=True))
    assert ignoring.categories == {7: "car"}


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"category_map": ("walker=person",)}, "--category-map must name some of Pedestrian, people, car, tram, got"),
        ({"category_map": ("person",)}, "--category-map must be NAME=CLASS, .* got 'person'"),
        ({"category_map": ("people=",)}, "--category-map must be NAME=CLASS, .* got 'people='"),
        (
            {"category_map": ("people=person", "People=car")},
            "--category-map must name a category once, got 'People' tw",
        ),
        ({"classes": ("person",)}, "--classes must name some of Pedestrian, people, car, tram, got person"),
        ({"classes": ("tram",), "ignore_unknown": True}, "must be left, got none that the detector knows among Pedest"),
    ],
)
def test_a_choice_that_fits_no_category_is_refused(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_categories(STREET, COCO, CategoryChoice(**choice))


def test_the_objects_of_a_choice_keep_all_but_their_category() -> None:
    objects = [
        {"id": i, "image_id": 1, "category_id": key, "bbox": [i, 0, 5, 5], "iscrowd": 0}
        for i, key in enumerate(STREET, 1)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": objects,
        "categories": [{"id": key, "name": name} for key, name in STREET.items()],
    }
    choice = CategoryChoice(category_map=("pedestrian=person", "people=person"), ignore_unknown=True)
    some = with_chosen(document, choose_categories(STREET, COCO, choice))
    assert some["images"] == document["images"]
    assert some["categories"] == [{"id": 4, "name": "person"}, {"id": 7, "name": "car"}]
    assert some["annotations"] == [objects[0], {**objects[1], "category_id": 4}, objects[2]]


def test_classes_of_a_detector_are_named() -> None:
    assert classes_named(COCO, None) == COCO
    assert classes_named(COCO, ("Truck", "person")) == {1: "person", 8: "truck"}
    with pytest.raises(UserError, match="--classes must name some of person, car, truck, got tram"):
        classes_named(COCO, ("tram",))


# --- in runs -------------------------------------------------------------------------------------------


def metrics_of(data: Path, output: Path, flags: Sequence[str] = (), command: str = "eval") -> dict[str, Any]:
    common = ("--engine", "local", "--detector", SAMPLE_DETECTOR, "--report-pictures", "1", "--output", str(output))
    what = ("--data", str(data), "--policies", "whole", "oracle")
    if command == "detect":
        what = ("--images", str(data / "val2017"), "--policy", "whole")
    assert run_command(command, *what, *common, *flags) == 0
    return json.loads((output / "metrics.json").read_text())


def with_other_names(sample: Path, target: Path, *, doubled: bool = False) -> Path:
    """The sample whose circles are discs, and whose squares are the data set's alone."""
    (target / "annotations").mkdir(parents=True)
    (target / "val2017").symlink_to(sample / "val2017")
    document = json.loads((sample / "annotations/instances_val2017.json").read_text())
    for row in document["categories"]:
        row["name"] = {"circle": "Disc", "square": "box"}.get(row["name"], row["name"])
    document["categories"].append({"id": 99, "name": "roundel"})
    for row in document["annotations"]:
        if row["category_id"] == 1 and row["id"] % 2:
            row["category_id"] = 99
    (target / "annotations/instances_val2017.json").write_text(json.dumps(document))
    return target


def test_an_evaluation_under_other_names_measures_the_same(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_other_names(sample, tmp_path / "data")
    flags = ("--category-map", "disc=circle", "roundel=circle", "box=square")
    plain = metrics_of(sample, tmp_path / "plain")
    renamed = metrics_of(data, tmp_path / "renamed", flags)
    assert "renamed Disc -> circle, box -> square, roundel -> circle" in capsys.readouterr().out
    assert renamed.pop("renamed_categories") == {"Disc": "circle", "box": "square", "roundel": "circle"}
    assert renamed.pop("left_out_categories") == []
    for policy, figures in plain["policies"].items():
        measured = {key: value for key, value in figures.items() if key.startswith(("AP", "AR"))}
        assert measured["AP"] > 5
        assert {key: renamed["policies"][policy][key] for key in measured} == measured
    # A run that goes on must be of the same choice.
    again = ("eval", "--data", str(data), "--policies", "whole", "oracle", "--detector", SAMPLE_DETECTOR)
    resume = ("--engine", "local", "--resume", "--output", str(tmp_path / "renamed"))
    assert run_command(*again, *resume, *flags) == 0
    assert run_command(*again, *resume, *flags[:2], *flags[2:], "--ignore-unknown") == 2
    assert "categories.ignore_unknown: False then, True now" in capsys.readouterr().err


def test_unknown_categories_are_refused_or_ignored(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_other_names(sample, tmp_path / "data")
    check = ("check", "--data", str(data), "--detector", SAMPLE_DETECTOR, "--policies", "whole")
    assert run_command(*check) == 2
    assert "the detector must know every category of the data set" in capsys.readouterr().err
    assert run_command(*check, "--ignore-unknown") == 0
    assert "left out Disc, box, roundel" in capsys.readouterr().out
    ignored = metrics_of(data, tmp_path / "ignored", ("--ignore-unknown",))
    assert ignored["left_out_categories"] == ["Disc", "box", "roundel"]
    chosen = metrics_of(
        sample, tmp_path / "chosen", ("--classes", *(name for name in KNOWN if name not in ("circle", "square")))
    )
    assert ignored["policies"]["whole"]["AP"] == chosen["policies"]["whole"]["AP"]
    results = json.loads((tmp_path / "ignored" / "results.json").read_text())
    assert results
    assert not {row["category_id"] for row in results} & {1, 2, 99}


KNOWN = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent", "hourglass", "arrow")


def test_detection_keeps_the_named_classes_alone(sample: Path, tmp_path: Path) -> None:
    every = metrics_of(sample, tmp_path / "every", command="detect")
    some = metrics_of(sample, tmp_path / "some", ("--classes", "ring", "star"), command="detect")
    assert sorted(some["categories"].values()) == ["ring", "star"]
    labels = {int(key) for key in some["categories"]}
    found = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("every", "some")]
    assert 0 < len(found[1]) < len(found[0])
    assert {row["category_id"] for row in found[1]} <= labels
    assert len(every["categories"]) == len(KNOWN)
