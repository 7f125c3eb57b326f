"""A detector whose process ends once in a run on Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from scalenet_ray.core.detections import Detections

DIED = "DIED_FILE"
"""The environment variable with the file that says that it has happened."""


class Dying:
    """Finds one box in each tile; at its second call in an actor of the engine it ends its process, once."""

    input_side = 64
    iou_threshold = 0.5
    categories: ClassVar = {0: "box"}

    def __init__(self) -> None:
        self._calls = 0

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return hw

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections]:
        self._calls += 1
        died = Path(os.environ[DIED])
        # Ray names an actor's process after its class.
        if self._calls == 2 and "DetectStage" in Path("/proc/self/cmdline").read_text() and not died.exists():
            died.touch()
            os._exit(1)
        return [Detections(np.array([[1.0, 2.0, 30.0, 40.0]]), np.array([0.9]), np.array([0])) for _ in pixels]
