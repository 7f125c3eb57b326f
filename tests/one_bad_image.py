"""Images in memory, one of which cannot be read."""

from __future__ import annotations

import numpy as np

from bench.fakes import grey_image
from scalenet_ray.core.errors import TileError
from scalenet_ray.data.image_records import ImageRecord

BAD_IMAGE = 3


def open_but_one(record: ImageRecord) -> np.ndarray:
    if record.image_id == BAD_IMAGE:
        reason = "not a picture"
        raise TileError(reason)
    return grey_image(record)
