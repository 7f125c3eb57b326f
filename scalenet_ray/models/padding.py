"""Padding of tiles to canvases, batches of tiles with equal canvases, and boxes without the padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.rectangles import STRIDE

PADDING_GREY = 114
"""Value of the padding in all channels, that of the YOLO family."""

HW = tuple[int, int]

Answer = TypeVar("Answer")


def stride_canvas(hw: HW, stride: int = STRIDE, few_to: int | None = None) -> HW:
    """The smallest canvas (height, width) of a tile with sides that are multiples of a stride, in tile pixels.

    Args:
        hw: (height, width) of the tile.
        stride: in tile pixels.
        few_to: the detector's input side, to have few shapes, as on a GPU (`detect_by_canvas`): sides are 1/2, 1, 3/2,
            2, 3, 4, 6, 8, ... of it, in whole strides; None for any multiple of the stride.
    """
    height, width = (-(-side // stride) for side in hw)
    if few_to is not None:
        whole = -(-few_to // stride)
        height, width = _few(height, whole), _few(width, whole)
    return height * stride, width * stride


def _few(side: int, whole: int) -> int:
    """The least of 2^n and 3 * 2^n halves of a whole side that is not under a side, in strides."""
    halves = 1 + 2 * (side - 1) // whole
    double = 1 << (halves - 1).bit_length()
    return -(-whole * (double * 3 // 4 if double * 3 // 4 >= halves else double) // 2)


def square_canvas(hw: HW, least: int) -> HW:
    """The smallest square canvas of a tile of (height, width), of at least `least` tile pixels a side."""
    side = max(*hw, least)
    return stride_canvas((side, side))


def fixed_canvas(hw: HW, fixed_hw: HW, remedy: str = "or export it with free height and width") -> HW:
    """Canvas (height, width) of a tile of (height, width) in a network of fixed input size.

    Raises:
        UserError: if the tile exceeds the network's input; `remedy` is what helps beside smaller tiles.
    """
    if hw[0] > fixed_hw[0] or hw[1] > fixed_hw[1]:
        msg = (
            f"a tile of {hw[0]} x {hw[1]} does not fit this network's fixed input of {fixed_hw[0]} x {fixed_hw[1]}: "
            f"cut tiles of at most {min(fixed_hw)} {remedy}"
        )
        raise UserError(msg)
    return fixed_hw


def padded(tiles: Sequence[np.ndarray], canvas: HW, grey: int = PADDING_GREY) -> np.ndarray:
    """Tiles, [h, w, 3] uint8 RGB each -> [B, H, W, 3] uint8 RGB, padded with grey at the right and below."""
    batch = np.full((len(tiles), *canvas, 3), grey, np.uint8)
    for i, tile in enumerate(tiles):
        batch[i, : tile.shape[0], : tile.shape[1]] = tile
    return batch


def in_tile(found: Detections, tile_hw: HW) -> Detections:
    """Detections on a canvas, clipped to the tile in its corner; those in the padding are dropped."""
    height, width = tile_hw
    inside = replace(found, boxes=np.clip(found.boxes, 0, [width, height, width, height]))
    return inside[inside.areas > 0]


def detect_by_canvas(
    pixels: Sequence[np.ndarray],
    canvas_hw: Callable[[HW], HW],
    detect_group: Callable[[list[np.ndarray], HW], list[Answer]],
    few_shapes: bool = False,
) -> list[Answer]:
    """Detect on tiles of mixed sizes, with one batch per canvas size; outputs are in the order of the tiles.

    A GPU's library of convolutions prepares for each shape of a batch that it has not met, which takes a second of a
    YOLO. There batches have 1, 2, 4, 8, ... tiles, the last one again where tiles lack.

    Args:
        pixels: [height, width, 3] uint8 RGB each.
        canvas_hw: (height, width) of a tile -> (height, width) of its canvas.
        detect_group: tiles with equal canvases, and the canvas -> output per tile.
        few_shapes: fill batches, as for a GPU.

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
        size = 1 << (len(positions) - 1).bit_length() if few_shapes else len(positions)
        batch = [pixels[i] for i in positions + positions[-1:] * (size - len(positions))]
        found.update(zip(positions, detect_group(batch, canvas)[: len(positions)], strict=True))
    return [found[position] for position in range(len(pixels))]
