"""Report pages of invented runs."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int, hw: tuple[int, int] = (120, 160)) -> str:
    """A JPEG of noise as a data URI."""
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (hw[0] // 8, hw[1] // 8, 3), np.uint8)
    Image.fromarray(pixels).resize(hw[::-1]).save(sink, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def big_page(images: int, pictures: int, hw: tuple[int, int] = (120, 160)) -> tuple[Any, Any]:
    """metrics.json and details of a page: image i gains i % 7 objects of class 1 + i % 3, and loses one if i is odd."""
    row = {"AP": 30.0, "AP50": 50.0, "AP_small": 10.0, "AP_large": 60.0, "detector_passes_per_image": 1.0}
    document = {
        "images": {"total": images, "done": images, "failed": 0},
        "policies": {"whole": row, "scalenet": row | {"AP_small": 20.0, "detector_passes_per_image": 2.0}},
    }
    rows = [
        {
            "id": i,
            "objects": 9,
            "labels": [1 + i % 3],
            "by": {"whole": [2, 0, 0], "scalenet": [2 + i % 7 - i % 2, i % 7, i % 2]},
        }
        for i in range(images)
    ]
    shown = [
        {
            "id": i,
            "file": f"{i}.jpg",
            "group": ("gained", "lost", "random")[i % 3],
            "height": hw[0],
            "width": hw[1],
            "photo": photo(i, hw),
            "truth": [[5, 5, 25, 25, 1 + i % 3, 1, 0]],
            "boxes": {
                "whole": [[60, 60, 90, 90, 0.9, 1 + i % 3, 0, "correct", 0]],
                "scalenet": [
                    [60, 60, 90, 90, 0.9, 1 + i % 3, 0, "correct", 0],
                    [5, 5, 25, 25, 0.8, 1 + i % 3, 1, "correct", 1],
                    [100, 10, 120, 30, 0.5, 1 + i % 3, 1, "background", 1],
                ],
            },
            "before": {name: [[60, 60, 90, 90, 0.9, 1 + i % 3, 0, "correct", 0]] for name in ("whole", "scalenet")},
            "looks": {
                "whole": {"windows": [], "map": None},
                "scalenet": {"windows": [[0, 0, 80, 60, 1], [0, 0, 40, 30, 2]], "map": photo(i, (16, 16))},
            },
        }
        for i in range(pictures)
    ]
    details = {
        "compared_with": "whole",
        "shown_score": 0.3,
        "images": rows,
        "pictures": shown,
        "files": {i: f"{i}.jpg" for i in range(images)},
        "categories": {1: "cat", 2: "dog", 3: "cow"},
        "changes": {
            "scalenet": {
                name: [{"name": "cat", "objects": 9, "before": 1, "after": 5, "gained": 5, "lost": 1}]
                for name in ("by_class", "by_side")
            }
        },
        "curves": {"whole": {"small": {"iou50": [50.0] * 101, "mean": [30.0] * 101}}},
        "errors": {"whole": {kind: {"count": 3, "cost": 2.5} for kind in ("class", "missed")}},
        "throughput": {"whole": [[1.0, 3], [2.0, 7]]},
    }
    return document, details
