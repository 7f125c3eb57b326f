"""What a run folder holds, image by image: for what evaluates it, exports it or shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.schemas import detections_from_rows
from scalenet_ray.engine.runs import RunFolder

__all__ = ["FinishedImage", "finished_images"]


class FinishedImage(NamedTuple):
    """One image that a policy has finished.

    Attributes:
        image_id: its id.
        file: as the annotations name it, or its whole address where images were listed.
        hw: (height, width) in image pixels.
        detections: merged, in image pixels, the best first; labels are category ids.
    """

    image_id: int
    file: str
    hw: tuple[int, int]
    detections: Detections


def finished_images(run: RunFolder, policy: str) -> Iterator[FinishedImage]:
    """The images that one policy has finished, in order of their ids; those that failed are left out.

    Args:
        run: the run folder.
        policy: the policy's name.
    """
    images = run.table("images", policy, ["image_id", "file", "height", "width", "failure_stage"])
    table = run.table("detections", policy).combine_chunks()
    ids = table.column("image_id").to_numpy()
    for row in images.to_pylist():
        if row["failure_stage"] is None:
            start, end = np.searchsorted(ids, [row["image_id"], row["image_id"] + 1]).tolist()
            found = detections_from_rows(table.slice(start, end - start))
            yield FinishedImage(row["image_id"], row["file"], (row["height"], row["width"]), found)
