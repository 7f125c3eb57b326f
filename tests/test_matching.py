"""Matching image by image against pycocotools over all images at once."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scalenet_ray.data.coco import CocoDataset, parse_annotations
from scalenet_ray.evaluation.ap import METRICS, evaluate, precision_curves
from scalenet_ray.evaluation.matching import match_results

IMAGES = 23
SIDE = 300


def scenes(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of four categories, some of them crowds, and results with equal scores, duplicates and false boxes.

    The last category has no objects, and some images have none either.
    """
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(0, 2 * IMAGES, 2):
        for _ in range(int(rng.integers(0, 6))):
            x, y, side = rng.uniform(0, 150), rng.uniform(0, 150), rng.choice([10.0, 40.0, 120.0])
            category = int(rng.integers(1, 4))
            box = [x, y, side, side * 0.8]
            row = {"image_id": image_id, "category_id": category, "bbox": box, "area": side * side * 0.8}
            crowd = int(rng.random() < 0.1)
            annotations.append({"id": len(annotations) + 5, "iscrowd": crowd, "segmentation": [corners(box)], **row})
            for _ in range(int(rng.integers(0, 3))):
                shift = rng.normal(0, side / 8, 2)
                moved = [max(0.0, x + shift[0]), max(0.0, y + shift[1]), side, side * 0.8]
                results.append({"image_id": image_id, "category_id": category, "bbox": moved, "score": score(rng)})
        for _ in range(int(rng.integers(0, 3))):
            box = [*rng.uniform(0, 150, 2).tolist(), 20.0, 20.0]
            wrong = int(rng.integers(1, 5))
            results.append({"image_id": image_id, "category_id": wrong, "bbox": box, "score": score(rng)})
    for row in results:
        row["segmentation"] = coco_mask.frPyObjects([corners(row["bbox"])], SIDE, SIDE)[0]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(0, 2 * IMAGES, 2)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 5)],
        "annotations": annotations,
    }
    return document, results


def corners(box: list[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def score(rng: np.random.Generator) -> float:
    return round(float(rng.random()), 1)


def by_pycocotools(document: dict[str, Any], results: list[dict[str, Any]], iou_type: Any) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()
        found = COCO()
        rows = [
            {**row, "id": i, "iscrowd": 0, "area": area_of(row, iou_type)} for i, row in enumerate(results, start=1)
        ]
        found.dataset = {**document, "annotations": rows}
        found.createIndex()
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def area_of(row: dict[str, Any], iou_type: str) -> float:
    return float(coco_mask.area(row["segmentation"])) if iou_type == "segm" else row["bbox"][2] * row["bbox"][3]


@pytest.mark.parametrize("images_at_once", [1, 4, 200])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_metrics_and_curves_are_those_of_pycocotools(
    monkeypatch: pytest.MonkeyPatch, images_at_once: int, iou_type: Any
) -> None:
    monkeypatch.setattr("scalenet_ray.evaluation.matching._IMAGES_AT_ONCE", images_at_once)
    for seed in range(3):
        document, results = scenes(seed)
        expected = by_pycocotools(document, results, iou_type)
        ours = evaluate(document, results, iou_type=iou_type)
        assert list(ours) == list(METRICS)
        assert list(ours.values()) == pytest.approx((100 * expected.stats).tolist(), abs=1e-9)
        precision = expected.eval["precision"][..., -1]
        for area, (size, curve) in enumerate(
            precision_curves(match_results(parse_annotations(document), results, iou_type=iou_type)).items(), start=1
        ):
            known = precision[:, :, precision[0, 0, :, area] > -1, area]
            assert size == ("small", "medium", "large")[area - 1]
            assert curve["mean"] == pytest.approx((100 * known.mean(axis=(0, 2))).tolist(), abs=1e-9)
            assert curve["iou50"] == pytest.approx((100 * known[0].mean(axis=1)).tolist(), abs=1e-9)


def test_results_out_of_order_are_refused_by_the_matching_and_sorted_by_evaluate() -> None:
    document, results = scenes(0)
    dataset = parse_annotations(document)
    with pytest.raises(ValueError, match="in order of their image ids"):
        match_results(dataset, results[::-1])
    assert evaluate(dataset, sorted(results, key=lambda row: -row["image_id"])) == evaluate(dataset, results)


def test_memory_is_that_of_a_few_images_and_compact_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    document, results = scenes(1)
    held: list[int] = []
    evaluated: Callable[..., COCOeval] = COCOeval.evaluate

    def counting(evaluation: COCOeval) -> None:
        held.append(len(evaluation.params.imgIds))
        evaluated(evaluation)

    monkeypatch.setattr(COCOeval, "evaluate", counting)
    monkeypatch.setattr("scalenet_ray.evaluation.matching._IMAGES_AT_ONCE", 4)
    dataset: CocoDataset = parse_annotations(document)
    match_results(dataset, results)
    assert held == [4, 4, 4, 4, 4, 3]
