from __future__ import annotations

from typing import Any

import pytest

from scalenet_ray.core.coco import CocoDataset, parse_annotations
from scalenet_ray.core.error_kinds import ERROR_KINDS, error_breakdown
from scalenet_ray.core.evaluation import evaluate
from tests.test_intervals import scenes

OBJECT = [100.0, 100.0, 40.0, 40.0]
HALF_BESIDE = [120.0, 100.0, 40.0, 40.0]  # an IoU of 1/3 with it
ELSEWHERE = [300.0, 300.0, 40.0, 40.0]


def one_image(*objects: tuple[list[float], int], crowd: bool = False) -> CocoDataset:
    annotations = [
        {"id": i, "image_id": 1, "category_id": label, "bbox": box, "area": 1600, "iscrowd": int(crowd)}
        for i, (box, label) in enumerate(objects, start=1)
    ]
    return parse_annotations(
        {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 480, "width": 640}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "kite"}, {"id": 2, "name": "bird"}],
        }
    )


def found(box: list[float], label: int, score: float) -> dict[str, Any]:
    return {"image_id": 1, "category_id": label, "bbox": box, "score": score}


@pytest.mark.parametrize(
    ("objects", "results", "kind", "gain"),
    [
        # Nothing is found: mended, all is.
        ([(OBJECT, 1)], [found(HALF_BESIDE, 1, 0.9)], "localisation", 100),
        ([(OBJECT, 1)], [found(OBJECT, 2, 0.9)], "class", 100),
        ([(OBJECT, 1)], [], "missed", 100),
        # A surer false one halves the precision.
        ([(OBJECT, 1)], [found(OBJECT, 1, 0.8), found(ELSEWHERE, 1, 0.9)], "background", 50),
        ([(OBJECT, 1), (ELSEWHERE, 2)], [found(OBJECT, 1, 0.8), found([320, 300, 40, 40], 1, 0.9)], "both", 25),
        # Of two that find the same object one counts; the third place is the second object's.
        (
            [(OBJECT, 1), (ELSEWHERE, 1)],
            [found(OBJECT, 1, 0.9), found([101, 100, 40, 40], 1, 0.8), found(ELSEWHERE, 1, 0.7)],
            "duplicate",
            100 - (51 + 50 * 2 / 3) * 100 / 101,
        ),
    ],
)
def test_an_error_is_of_one_kind_and_costs_what_mending_it_brings(
    objects: list[tuple[list[float], int]], results: list[dict[str, Any]], kind: str, gain: float
) -> None:
    breakdown = error_breakdown(one_image(*objects), results)
    assert tuple(breakdown) == ERROR_KINDS
    assert breakdown[kind] == pytest.approx(gain, abs=1e-6)


def test_what_errors_of_place_would_find_is_not_missed() -> None:
    breakdown = error_breakdown(one_image((OBJECT, 1)), [found(HALF_BESIDE, 1, 0.9)])
    assert breakdown["missed"] == 0
    assert {kind for kind, gain in breakdown.items() if gain} == {"localisation"}


def test_only_the_surest_of_several_wrong_ones_finds_the_object_when_mended() -> None:
    results = [found(OBJECT, 2, 0.5), found([101, 100, 40, 40], 2, 0.9)]
    assert error_breakdown(one_image((OBJECT, 1)), results)["class"] == pytest.approx(100)


def test_a_class_error_on_an_object_that_is_found_is_only_taken_away() -> None:
    results = [found(OBJECT, 1, 0.9), found(OBJECT, 2, 0.8), found(ELSEWHERE, 2, 0.7)]
    # Bird's AP rises from a half to one, kite's stays.
    assert error_breakdown(one_image((OBJECT, 1), (ELSEWHERE, 2)), results)["class"] == pytest.approx(25)


def test_what_lies_on_a_crowd_is_no_error() -> None:
    results = [found(OBJECT, 1, 0.9)]
    assert set(error_breakdown(one_image((OBJECT, 1), crowd=True), results).values()) == {0.0}


def test_without_errors_nothing_is_gained_and_with_them_no_more_than_is_missing() -> None:
    dataset, results = scenes(12)
    missing = 100 - evaluate(dataset, results)["AP50"]
    breakdown = error_breakdown(dataset, results)
    assert all(0 <= gain <= missing + 1e-6 for gain in breakdown.values())
    assert breakdown["missed"] > 0 < breakdown["background"]
    perfect = [
        {"image_id": int(image_id), "category_id": int(label), "bbox": box.tolist(), "score": 1.0}
        for image_id, label, box in zip(dataset.image_ids, dataset.labels, dataset.boxes_xywh, strict=True)
    ]
    assert all(gain == pytest.approx(0, abs=1e-9) for gain in error_breakdown(dataset, perfect).values())
