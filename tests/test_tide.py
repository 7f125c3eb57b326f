"""Error types after TIDE (Bolya et al., 2020), on hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from scalenet_ray.core.detections import Detections
from scalenet_ray.data.coco import Objects, parse_annotations
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.evaluation.compare import closer_look_in_words, found_and_lost, gained_and_lost
from scalenet_ray.evaluation.tide import KINDS, Explained, average_precision, error_breakdown, explain

SQUARE = (0.0, 0.0, 10.0, 10.0)
FAR = (100.0, 100.0, 110.0, 110.0)


def objects(*rows: tuple[tuple[float, ...], int], crowd: tuple[int, ...] = ()) -> Objects:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).astype(np.float64)
    labels = np.array([label for _, label in rows], np.int64)
    return Objects(boxes, areas, labels, np.isin(np.arange(len(rows)), crowd), (None,) * len(rows))


def detections(*rows: tuple[tuple[float, ...], int, float]) -> Detections:
    boxes = np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4)
    return Detections(boxes, [score for _, _, score in rows], [label for _, label, _ in rows])


def kinds(explained: Explained) -> list[str]:
    return [KINDS[kind] for kind in explained.kinds]


# Of a square with sides of 10, shifted by s: an IoU of (10 - s) / (10 + s).
HALF_OFF = (5.0, 0.0, 15.0, 10.0)
BARELY = (9.0, 0.0, 19.0, 10.0)


@pytest.mark.parametrize(
    ("box", "label", "kind"),
    [
        (SQUARE, 1, "correct"),
        (SQUARE, 2, "class"),
        (HALF_OFF, 1, "localisation"),
        (HALF_OFF, 2, "both"),
        (BARELY, 1, "background"),
        (FAR, 1, "background"),
    ],
)
def test_a_box_is_wrong_in_one_way(box: tuple[float, ...], label: int, kind: str) -> None:
    assert kinds(explain(detections((box, label, 0.9)), objects((SQUARE, 1)))) == [kind]


def test_the_second_box_of_an_object_is_a_duplicate_and_the_best_one_counts() -> None:
    explained = explain(detections((SQUARE, 1, 0.5), (SQUARE, 1, 0.9)), objects((SQUARE, 1)))
    assert explained.scores.tolist() == pytest.approx([0.9, 0.5])
    assert kinds(explained) == ["correct", "duplicate"]
    assert explained.found_at.tolist() == [pytest.approx(0.9)]


def test_a_box_in_a_crowd_is_neither_right_nor_wrong() -> None:
    explained = explain(detections((SQUARE, 1, 0.9), (SQUARE, 2, 0.8)), objects(((0, 0, 50, 50), 1), crowd=(0,)))
    assert kinds(explained) == ["ignored", "background"]
    assert len(explained.found_at) == 0


def test_an_object_is_missed_where_no_error_stands_for_it() -> None:
    truth = objects((SQUARE, 1), (FAR, 1), ((200, 0, 210, 10), 1))
    explained = explain(detections((SQUARE, 2, 0.9), (FAR, 1, 0.8)), truth)
    assert explained.missed.tolist() == [False, False, True]


def test_without_boxes_or_objects_nothing_breaks() -> None:
    nothing = explain(Detections.empty(), objects())
    assert error_breakdown([nothing], 0.3)["missed"] == {"count": 0, "cost": 0.0}
    assert error_breakdown([], 0.3)["class"] == {"count": 0, "cost": 0.0}
    assert kinds(explain(detections((SQUARE, 1, 0.9)), objects())) == ["background"]
    assert explain(Detections.empty(), objects((SQUARE, 1))).missed.tolist() == [True]


def test_each_kind_costs_what_mending_it_brings() -> None:
    truth = objects((SQUARE, 1), (FAR, 1))
    shifted = tuple(value + 5.0 if i % 2 == 0 else value for i, value in enumerate(FAR))
    localised = error_breakdown([explain(detections((SQUARE, 1, 0.9), (shifted, 1, 0.8)), truth)], 0.3)
    # Half of the recalls, and 0, are reached with a precision of 1: 51 of 101; mended, all are.
    assert localised["localisation"] == {"count": 1, "cost": pytest.approx(100 * 50 / 101)}
    assert localised["missed"]["cost"] == 0
    missed = error_breakdown([explain(detections((SQUARE, 1, 0.9)), truth)], 0.3)
    assert missed["missed"] == {"count": 1, "cost": pytest.approx(100 * 50 / 101)}
    false_first = detections(((50, 0, 60, 10), 1, 0.95), (SQUARE, 1, 0.9))
    background = error_breakdown([explain(false_first, objects((SQUARE, 1)))], 0.3)
    assert background["background"] == {"count": 1, "cost": pytest.approx(50.0)}
    wrong_class = error_breakdown([explain(detections((SQUARE, 2, 0.9)), objects((SQUARE, 1)))], 0.3)
    assert wrong_class["class"] == {"count": 1, "cost": pytest.approx(100.0)}
    twice = detections((SQUARE, 1, 0.9), (SQUARE, 1, 0.8), (FAR, 1, 0.7))
    assert error_breakdown([explain(twice, truth)], 0.3)["duplicate"]["cost"] == pytest.approx(100 * 50 / 101 / 3)


def test_errors_below_the_score_are_not_counted_but_cost() -> None:
    breakdown = error_breakdown([explain(detections((SQUARE, 2, 0.1)), objects((SQUARE, 1)))], 0.3)
    assert breakdown["class"] == {"count": 0, "cost": pytest.approx(100.0)}
    assert breakdown["missed"]["count"] == 1


def test_its_ap_is_pycocotools_own() -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 80, (40, 2)).astype(np.float32)
    truth = objects(*((tuple([*corner, *(corner + 12)]), int(i % 3) + 1) for i, corner in enumerate(boxes)))
    moved = boxes + rng.normal(0, 2.5, boxes.shape).astype(np.float32)
    rows = [(tuple([*corner, *(corner + 12)]), int(i % 3) + 1, float(rng.random())) for i, corner in enumerate(moved)]
    found = detections(*rows)
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": int(label), "area": 144.0, "iscrowd": 0}
        | {"bbox": [*map(float, box[:2]), 12.0, 12.0]}
        for i, (box, label) in enumerate(zip(truth.boxes, truth.labels, strict=True))
    ]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    images = [{"id": 1, "file_name": "1.jpg", "height": 100, "width": 100}]
    dataset = parse_annotations({"images": images, "annotations": annotations, "categories": categories})
    results = [
        {"image_id": 1, "category_id": label, "score": score, "bbox": [*map(float, box[:2]), 12.0, 12.0]}
        for box, label, score in rows
    ]
    expected = evaluate(dataset, results)["AP50"]
    assert 0 < expected < 100
    assert average_precision([explain(found, truth)]) == pytest.approx(expected, abs=1e-9)


def test_gains_and_losses_are_told_by_class_and_by_size() -> None:
    truth = objects((SQUARE, 1), (FAR, 2), ((200, 0, 300, 100), 1))
    before = explain(detections((FAR, 2, 0.9), ((200, 0, 300, 100), 1, 0.9)), truth)
    after = explain(detections((SQUARE, 1, 0.9), (FAR, 2, 0.2), ((200, 0, 300, 100), 1, 0.9)), truth)
    gained, lost = found_and_lost(before, after, 0.3)
    assert (gained.tolist(), lost.tolist()) == ([True, False, False], [False, True, False])
    changes = gained_and_lost([before], [after], {1: "cat", 2: "dog", 3: "cow"}, 0.3)
    rows = {row["name"]: row for row in changes["by_class"]}
    assert rows["cat"] == {"name": "cat", "objects": 1, "before": 0, "after": 1, "gained": 1, "lost": 0}
    assert rows["dog"] == {"name": "dog", "objects": 1, "before": 1, "after": 0, "gained": 0, "lost": 1}
    assert list(rows) == ["cat", "dog"]
    sides = {row["name"]: row["objects"] for row in changes["by_side"]}
    assert sides == {"8 to 12": 2, "96 or more": 1}


@pytest.mark.parametrize(
    ("after", "before", "new", "lost", "words"),
    [
        (
            6,
            3,
            3,
            1,
            "3 more than the pass over the whole image alone finds (3): 3 new by looking closer, 1 lost, 1 further",
        ),
        (5, 3, 2, 0, "2 more than the pass over the whole image alone finds (3): 2 new by looking closer, 0 lost"),
        (
            2,
            4,
            1,
            2,
            "2 fewer than the pass over the whole image alone finds (4): 1 new by looking closer, 2 lost, 1 fewer",
        ),
    ],
)
def test_what_a_closer_look_brought_adds_up(after: int, before: int, new: int, lost: int, words: str) -> None:
    said = closer_look_in_words({"after": after, "before": before, "new": new, "lost": lost})
    assert said.removesuffix(" on what it found") == words
