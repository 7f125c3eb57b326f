"""Batches of ONNX detectors: fixed canvases, padding, and the number of tiles per call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime

from scalenet_ray.core.errors import UserError

__all__ = ["PADDING_GREY", "fixed_canvas", "padded", "tiles_at_once"]

PADDING_GREY = 114
"""Value of the padding in all channels, that of the YOLO family."""

HW = tuple[int, int]


def fixed_canvas(hw: HW, fixed_hw: HW) -> HW:
    """Canvas (height, width) of a tile of (height, width) in a network of fixed input size.

    Raises:
        UserError: if the tile exceeds the network's input.
    """
    if hw[0] > fixed_hw[0] or hw[1] > fixed_hw[1]:
        msg = (
            f"a tile of {hw[0]} x {hw[1]} does not fit this network's fixed input of {fixed_hw[0]} x {fixed_hw[1]}: "
            f"cut tiles of at most {min(fixed_hw)} or export it with free height and width"
        )
        raise UserError(msg)
    return fixed_hw


def padded(tiles: Sequence[np.ndarray], canvas: HW) -> np.ndarray:
    """Tiles, [h, w, 3] uint8 RGB each -> [B, H, W, 3] uint8 RGB, padded with grey at the right and below."""
    batch = np.full((len(tiles), *canvas, 3), PADDING_GREY, np.uint8)
    for i, tile in enumerate(tiles):
        batch[i, : tile.shape[0], : tile.shape[1]] = tile
    return batch


def tiles_at_once(session: onnxruntime.InferenceSession, count: int) -> int:
    """Number of tiles per call out of `count` of one canvas.

    Tiles are batched on GPUs. On CPUs single tiles are faster, since activations stay in the cache.
    """
    return max(1, count) if session.get_providers()[0] != "CPUExecutionProvider" else 1
