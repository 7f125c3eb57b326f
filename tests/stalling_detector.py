"""A detector that stops at one image, once, until its process gets a signal."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from scalenet_ray.core.detections import Detections

SIDE = 64
STALLED = "STALLED_FILE"
"""The environment variable with the file that says that it has happened."""


class Stalling:
    """Finds one box, scored by the image's grey; at the grey of the environment's STALLED_AT it halts, once.

    With STUBBORN in the environment it goes on halting when it is interrupted.
    """

    input_side = SIDE
    iou_threshold = 0.5
    categories: ClassVar = {0: "grey"}

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        return (SIDE, SIDE)

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections]:
        return [self._found(int(one[0, 0, 0])) for one in pixels]

    def _found(self, grey: int) -> Detections:
        stalled = Path(os.environ[STALLED])
        if grey == int(os.environ["STALLED_AT"]) and not stalled.exists():
            stalled.touch()
            try:
                time.sleep(600)
            finally:
                if "STUBBORN" in os.environ:
                    time.sleep(600)
        return Detections(np.array([[1.0, 2.0, 30.0, 40.0]]), np.array([grey / 255]), np.array([0]))


def write_grey_images(folder: Path, count: int) -> None:
    """00.png, 01.png, ...: 64 pixels a side, of grey 10, 20, ..."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (SIDE, SIDE), (10 * (i + 1),) * 3).save(folder / f"{i:02d}.png")
