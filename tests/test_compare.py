"""Paired bootstrap intervals of AP differences."""

from __future__ import annotations

import numpy as np
import pytest

from scalenet_ray.data.coco import CocoDataset, parse_annotations
from scalenet_ray.evaluation.ap import evaluate
from scalenet_ray.evaluation.compare import paired_intervals, resampled_ap
from scalenet_ray.evaluation.matching import Matches, match_results


def scenes(images: int, seed: int = 0) -> tuple[CocoDataset, list[dict]]:
    """Objects of three categories, some small, and results that find most of them, with false ones between."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        for _ in range(6):
            x, y = rng.integers(0, 400, 2).tolist()
            side = int(rng.integers(8, 120))
            label = int(rng.integers(1, 4))
            box = [x, y, side, side]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box}
                | {"area": side * side, "iscrowd": int(rng.random() < 0.05)}
            )
            if rng.random() < 0.7:
                shift = float(rng.normal(0, side / 20))
                found = {"bbox": [x + shift, y, side, side], "score": round(float(rng.random()), 2)}
                results.append({"image_id": image_id, "category_id": label} | found)
            if rng.random() < 0.5:
                wrong = {"bbox": [y, x, side, side], "score": round(float(rng.random()), 2)}
                results.append({"image_id": image_id, "category_id": label} | wrong)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 640, "width": 640} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"kind {i}"} for i in (1, 2, 3)],
    }
    return parse_annotations(content), results


def matched(dataset: CocoDataset, **results: list[dict]) -> dict[str, Matches]:
    return {name: match_results(dataset, rows) for name, rows in results.items()}


def test_drawing_each_image_once_is_pycocotools_own_figure() -> None:
    dataset, results = scenes(12)
    figures = evaluate(dataset, results)
    evaluation = match_results(dataset, results)
    for name, area in (("AP", 0), ("AP_small", 1), ("AP_large", 3)):
        assert resampled_ap(evaluation, area, np.ones((1, 12))) == pytest.approx(figures[name], abs=1e-9)


def test_an_image_drawn_no_times_is_as_if_it_were_not_there() -> None:
    dataset, results = scenes(8)
    weights = np.ones(8)
    weights[2] = 0
    left = [i for i in range(1, 9) if i != 3]
    expected = evaluate(dataset, results, image_ids=left)["AP"]
    assert resampled_ap(match_results(dataset, results), 0, weights[None]) == pytest.approx(expected, abs=1e-9)


def test_a_policy_that_is_always_better_has_an_interval_above_zero() -> None:
    dataset, results = scenes(20)
    worse = [row for i, row in enumerate(results) if i % 3]
    differences = paired_intervals(matched(dataset, a=worse, b=results, c=worse), "a", resamples=50)
    assert sorted(differences) == ["b", "c"]
    better = differences["b"]["AP"]
    assert 0 < better["low"] <= better["difference"] <= better["high"] or better["above"] > 0.9
    assert differences["c"]["AP"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "above": 0.0}


def test_the_same_seed_draws_the_same_images() -> None:
    dataset, results = scenes(10)
    both = matched(dataset, a=results[::2], b=results)
    runs = [paired_intervals(both, "a", resamples=20, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_baseline_that_is_no_policy_is_refused() -> None:
    dataset, results = scenes(3)
    with pytest.raises(ValueError, match="must be one of a, got 'z'"):
        paired_intervals(matched(dataset, a=results), "z")
