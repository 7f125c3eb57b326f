"""Images that kill or hang the process that works on them, every time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile
from scalenet_ray.core.scale import ScaleMap
from scalenet_ray.data.image_records import ImageRecord
from tests.faults import INPUT_SIDE, Scenes, WorkLog
from tests.oracles import BREAKING, RandomDetector, RandomScale


class Exit:
    """Ends its process each time, and says so in its log first."""

    def __init__(self, log: WorkLog) -> None:
        self._log = log

    def __call__(self) -> None:
        self._log.write("died")
        os._exit(1)


class Hang(Exit):
    """Does not come back."""

    def __call__(self) -> None:
        self._log.write("hung")
        time.sleep(10**6)


class HangOnce(Hang):
    """Does not come back the first time: then the file `marker` is there."""

    def __init__(self, log: WorkLog, marker: Path) -> None:
        super().__init__(log)
        self._marker = marker

    def __call__(self) -> None:
        try:
            os.close(os.open(self._marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        super().__call__()


class PoisonScenes(Scenes):
    """Scenes, but one image is all of the colour that `PoisonDetector` dies of."""

    def __init__(self, image_id: int) -> None:
        super().__init__()
        self._image_id = image_id

    def __call__(self, record: ImageRecord) -> np.ndarray:
        image = super().__call__(record)
        return np.full_like(image, BREAKING) if record.image_id == self._image_id else image


class PoisonDetector(RandomDetector):
    """A detector that strikes at any tile that shows `BREAKING`."""

    def __init__(self, strike: Callable[[], None]) -> None:
        super().__init__(input_side=INPUT_SIDE)
        self._strike = strike

    def __call__(self, pixels: Sequence[np.ndarray]) -> list[Detections | TileError]:
        if any((one == np.array(BREAKING)).all() for one in pixels):
            self._strike()
        return super().__call__(pixels)


class PoisonScale(RandomScale):
    """A Scale Net that strikes at any tile of one image."""

    def __init__(self, strike: Callable[[], None], image_id: int) -> None:
        super().__init__()
        self._strike, self._poison_id = strike, image_id

    def __call__(self, pixels: Sequence[np.ndarray], tiles: Sequence[Tile]) -> list[ScaleMap | TileError]:
        if any(tile.image_id == self._poison_id for tile in tiles):
            self._strike()
        return super().__call__(pixels, tiles)


class PoisonOpen:
    """Opens images, and strikes at one."""

    def __init__(self, strike: Callable[[], None], image_id: int) -> None:
        self._inner, self._strike, self._image_id = PoisonScenes(image_id), strike, image_id

    def __call__(self, record: ImageRecord) -> np.ndarray:
        if record.image_id == self._image_id:
            self._strike()
        return self._inner(record)
