"""Instance masks as run lengths: from a tile to its window, from a window to the whole image."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.window import Tile, Window

__all__ = ["mask_of_image", "mask_of_window"]


def mask_of_window(counts: bytes, tile: Tile) -> bytes:
    """A mask of a tile's pixels -> the same mask on the pixels of its window.

    Args:
        counts: compressed run lengths of a [tile.height, tile.width] mask.
        tile: the tile.

    Returns:
        Compressed run lengths of a [window.height, window.width] mask: each image pixel takes the tile pixel
        that its centre lies in.
    """
    mask = coco_mask.decode({"size": [tile.height, tile.width], "counts": counts})
    window = tile.window
    rows = (np.arange(window.height) * 2 + 1) * tile.height // (2 * window.height)
    columns = (np.arange(window.width) * 2 + 1) * tile.width // (2 * window.width)
    return _encoded(np.asfortranarray(mask[rows[:, None], columns]))


def mask_of_image(counts: bytes, window: Window, image_hw: tuple[int, int]) -> bytes:
    """A mask of a window -> the same mask on the whole image.

    Args:
        counts: compressed run lengths of a [window.height, window.width] mask.
        window: where the window lies, in image pixels.
        image_hw: (height, width) of the image.

    Returns:
        Compressed run lengths of a [height, width] mask, 0 outside the window.
    """
    mask = np.zeros(image_hw, np.uint8, order="F")
    mask[window.y0 : window.y1, window.x0 : window.x1] = coco_mask.decode(
        {"size": [window.height, window.width], "counts": counts}
    )
    return _encoded(mask)


def _encoded(mask: np.ndarray) -> bytes:
    """[h, w] uint8 in Fortran order -> compressed run lengths."""
    counts = coco_mask.encode(mask)["counts"]
    # The stubs allow for text, which only a mask read from JSON has.
    assert isinstance(counts, bytes)
    return counts
