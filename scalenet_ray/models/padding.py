"""Tiles on canvases: detectors pad a tile and never resize it, and compute tiles of one canvas together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

__all__ = [
    "STRIDE",
    "detect_by_canvas",
    "square_canvas",
]

STRIDE = 32
"""Sides of a canvas are multiples of this: the coarsest cell that the networks share, in tile pixels."""


HW = tuple[int, int]


Answer = TypeVar("Answer")


def square_canvas(hw: HW, least_side: int = 1) -> HW:
    """The smallest square that a tile fits in, with sides that are multiples of `STRIDE`.

    Args:
        hw: (height, width) of the tile.
        least_side: the square is never smaller than this.

    Returns:
        (height, width), equal, in tile pixels.
    """
    side = -(-max(*hw, least_side) // STRIDE) * STRIDE
    return side, side


def detect_by_canvas(
    pixels: Sequence[np.ndarray],
    canvas_hw: Callable[[HW], HW],
    detect_group: Callable[[list[np.ndarray], HW], list[Answer]],
) -> list[Answer]:
    """Detect tiles of mixed sizes with one call for each canvas.

    Args:
        pixels: [height, width, 3] uint8 RGB each.
        canvas_hw: (height, width) of a tile -> that of its canvas.
        detect_group: tiles of one canvas -> an answer each (detections, or an error), in order.

    Returns:
        The answer for each tile, in the order of `pixels`.

    Raises:
        ValueError: if a tile is no RGB picture of bytes.
    """
    groups: dict[HW, list[int]] = {}
    for position, tile in enumerate(pixels):
        if tile.ndim != 3 or tile.shape[2] != 3 or tile.dtype != np.uint8 or not tile.size:
            msg = f"a tile must be [height, width, 3] uint8 RGB, got {tile.dtype} of shape {list(tile.shape)}"
            raise ValueError(msg)
        groups.setdefault(canvas_hw(tile.shape[:2]), []).append(position)
    found: dict[int, Answer] = {}
    for canvas, positions in groups.items():
        found.update(zip(positions, detect_group([pixels[i] for i in positions], canvas), strict=True))
    return [found[position] for position in range(len(pixels))]
