"""Calls and shapes that a GPU would see of a detector's tiles, counted on a CPU: a call for each canvas of a row.

    SCALENET_RAY_DATA=DATA .venv/bin/python -m bench.canvases

Tiles of all images follow each other in rows. A batch has 1, 2, 4, 8, ... tiles, as on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bench.large import workload_of
from scalenet_ray.core.recursion import recursive_detect
from scalenet_ray.data.images import decode_image
from scalenet_ray.models.padding import stride_canvas


@dataclass(frozen=True)
class CountCanvases:
    """Calls and shapes of YOLO11n's tiles on a GPU.

    Attributes:
        sets: street, road, drone or coco; street, of four images, is taken four times.
        policies: each, on each set.
        row: tiles of a row.
    """

    sets: tuple[str, ...] = ("street", "road", "coco")
    policies: tuple[str, ...] = ("regions", "slices@640", "grid-3")
    row: int = 16


class _Noting:
    """A detector that notes the sizes of its tiles."""

    def __init__(self, detector: Any) -> None:
        self._detector = detector
        self.sizes: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._detector, name)

    def __call__(self, pixels: Sequence[np.ndarray]) -> Any:
        self.sizes += [tile.shape[:2] for tile in pixels]
        return self._detector(pixels)


def main(job: CountCanvases) -> None:
    """Print the figures."""
    for name in job.sets:
        workload = workload_of(name, "yolo11n", Path("runs/bench/large"))
        times = 4 if name == "street" else 1
        count = times * len(workload.records)
        for policy in job.policies:
            detect: Any = _Noting(workload.load_detector())
            for record in workload.records:
                pixels = decode_image((workload.folder / record.file_name).read_bytes())
                recursive_detect(pixels, record.image_id, workload.policy(policy), detect=detect)
            sizes = times * detect.sizes
            for title, few_to in (("any canvas", None), ("few canvases", detect.input_side)):
                canvas = partial(stride_canvas, few_to=few_to)
                rows = [Counter(map(canvas, sizes[i : i + job.row])) for i in range(0, len(sizes), job.row)]
                shapes = {(at, 1 << (tiles - 1).bit_length()) for row in rows for at, tiles in row.items()}
                calls = sum(map(len, rows)) / count
                print(f"{name} {policy} {title}: {len(sizes) / count:.1f} tiles, {calls:.2f} calls an image", end=", ")
                print(f"{len(shapes)} shapes", flush=True)


if __name__ == "__main__":
    main(tyro.cli(CountCanvases))
