"""Padding of tiles to canvases, and batches of tiles with equal canvases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

__all__ = [
    "STRIDE",
    "detect_by_canvas",
    "stride_canvas",
]

STRIDE = 32
"""Sides of a canvas are multiples of this: the coarsest stride of the networks in tile pixels."""

HW = tuple[int, int]

Answer = TypeVar("Answer")


def stride_canvas(hw: HW) -> HW:
    """The smallest canvas of a tile with sides that are multiples of `STRIDE`.

    Args:
        hw: (height, width) of the tile.

    Returns:
        (height, width) in tile pixels.
    """
    height, width = hw
    return -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE


def detect_by_canvas(
    pixels: Sequence[np.ndarray],
    canvas_hw: Callable[[HW], HW],
    detect_group: Callable[[list[np.ndarray], HW], list[Answer]],
) -> list[Answer]:
    """Detect on tiles of mixed sizes, with one batch per canvas size.

    Args:
        pixels: [height, width, 3] uint8 RGB each.
        canvas_hw: (height, width) of a tile -> (height, width) of its canvas.
        detect_group: tiles with equal canvases, and the canvas -> output per tile.

    Returns:
        Outputs in the order of `pixels`.

    Raises:
        ValueError: if a tile is not [height, width, 3] uint8.
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
