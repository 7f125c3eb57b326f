"""Which objects were found, and precision against recall."""

from __future__ import annotations

import numpy as np
import pytest

from scalenet_ray.core.evaluation import evaluate
from scalenet_ray.core.found_objects import found_objects
from scalenet_ray.core.precision_recall import precision_recall
from tests.test_error_kinds import ELSEWHERE, HALF_BESIDE, OBJECT, found, one_image
from tests.test_intervals import scenes


def test_an_object_has_the_score_of_what_found_it_or_none() -> None:
    dataset = one_image((OBJECT, 1), (ELSEWHERE, 2), ([10, 10, 20, 20], 1))
    results = [found(OBJECT, 1, 0.6), found([101, 100, 40, 40], 1, 0.9), found(ELSEWHERE, 1, 0.8)]
    objects = found_objects(dataset, results)
    # The surest that fits; the second is of another category, the third is not found.
    np.testing.assert_allclose(objects.scores, [0.9, 0.0, 0.0])
    np.testing.assert_array_equal(objects.category_ids, [1, 2, 1])
    np.testing.assert_array_equal(objects.rows, [0, 1, 2])


def test_a_box_beside_an_object_does_not_find_it() -> None:
    assert found_objects(one_image((OBJECT, 1)), [found(HALF_BESIDE, 1, 0.9)]).scores.tolist() == [0.0]


def test_crowds_and_images_that_do_not_count_are_left_out() -> None:
    dataset, results = scenes(6)
    objects = found_objects(dataset, results, image_ids=[2, 5])
    expected = np.flatnonzero(np.isin(dataset.image_ids, [2, 5]) & ~dataset.crowd)
    np.testing.assert_array_equal(objects.rows, expected)
    whole = found_objects(dataset, results)
    np.testing.assert_array_equal(whole.scores[np.isin(whole.rows, expected)], objects.scores)


def test_the_share_of_objects_found_is_the_recall_at_an_iou_of_a_half() -> None:
    dataset, results = scenes(10)
    objects = found_objects(dataset, results)
    curves = precision_recall(dataset, results)["all"]
    by_category = [np.mean(objects.scores[objects.category_ids == label] > 0) for label in (1, 2, 3)]
    reached = np.count_nonzero(np.array(curves["precision_50"])) - 1
    assert curves["recall"][reached] == pytest.approx(max(by_category), abs=0.01)


def test_the_means_of_the_curves_are_the_ap() -> None:
    dataset, results = scenes(10)
    figures, curves = evaluate(dataset, results), precision_recall(dataset, results)
    assert 100 * np.mean(curves["all"]["precision"]) == pytest.approx(figures["AP"])
    assert 100 * np.mean(curves["all"]["precision_50"]) == pytest.approx(figures["AP50"])
    for area in ("small", "medium", "large"):
        assert 100 * np.mean(curves[area]["precision"]) == pytest.approx(figures[f"AP_{area}"])


def test_sizes_without_objects_have_no_curve() -> None:
    assert list(precision_recall(one_image((OBJECT, 1)), [])) == ["all", "medium"]
