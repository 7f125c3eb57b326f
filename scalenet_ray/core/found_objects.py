"""Which annotated objects were found, and how surely: where one policy gains on another, and where it loses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalenet_ray.core.coco import CocoDataset
from scalenet_ray.core.evaluation import match_results

__all__ = ["FoundObjects", "found_objects"]


@dataclass(frozen=True, eq=False)
class FoundObjects:
    """The objects that count, in the data set's order.

    Attributes:
        rows: [N] int64, their rows in the data set.
        image_ids: [N] int64.
        category_ids: [N] int64.
        areas: [N] float64 mask pixels.
        scores: [N] float32, of the detection that found each; 0 where none did.
    """

    rows: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    areas: np.ndarray
    scores: np.ndarray


def found_objects(
    dataset: CocoDataset, results: Iterable[Mapping[str, Any]], *, image_ids: Collection[int] | None = None
) -> FoundObjects:
    """What became of each object: COCO's own matching, the surest detection first, at an IoU of 0.5.

    Args:
        dataset: the ground truth; crowds do not count.
        results: COCO results, as `to_results` gives them.
        image_ids: the images that count; all by default.
    """
    evaluation = match_results(dataset, results, image_ids=image_ids)
    chosen = np.isin(dataset.image_ids, evaluation.params.imgIds)
    rows = np.flatnonzero(chosen)
    scores = np.zeros(len(rows), np.float32)
    # Of all areas; categories come first, then areas, then images.
    count = len(evaluation.params.imgIds)
    places = np.array(evaluation.evalImgs, dtype=object).reshape(-1, len(evaluation.params.areaRng), count)
    for match in places[:, 0].ravel():
        if match is not None:
            score_of = dict(zip(match["dtIds"], match["dtScores"], strict=True))
            # Objects are numbered from 1, in the data set's order.
            for number, found_by in zip(match["gtIds"], match["gtMatches"][0].astype(int).tolist(), strict=True):
                scores[number - 1] = score_of.get(found_by, 0.0)
    counts = ~dataset.crowd[rows]
    rows = rows[counts]
    return FoundObjects(rows, dataset.image_ids[rows], dataset.labels[rows], dataset.areas[rows], scores[counts])
