"""Instance masks: as annotated, and as run lengths from a tile to its window and to the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.window import Tile, Window

__all__ = ["encode_mask", "is_mask_of", "mask_of_image", "mask_of_segmentation", "mask_of_window"]


def mask_of_segmentation(segmentation: Any, hw: tuple[int, int]) -> np.ndarray:
    """A segmentation as COCO writes it -> its mask on the image.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in image pixels, or {"size": [height, width], "counts":
            run lengths, as a list or as compressed text}.
        hw: (height, width) of the image.

    Returns:
        [h, w] uint8, 0 or 1.

    Raises:
        TileError: if it is damaged. It is checked here and not left to pycocotools, whose C code believes what it is
            given: a point far outside costs it gigabytes, run lengths past the end are written where they lead.
    """
    if isinstance(segmentation, list) and segmentation:
        polygons: Any = [_polygon(points, hw) for points in segmentation]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *hw)))
    fields: dict[str, Any] = segmentation if isinstance(segmentation, dict) else {}
    counts = fields.get("counts")
    if not isinstance(counts, list | str | bytes) or fields.get("size") not in (list(hw), tuple(hw)):
        msg = f'a segmentation must be polygons or {{"size": {list(hw)}, "counts": ...}}, got {_short(segmentation)}: '
        raise TileError(msg + "correct or remove the annotation")
    runs = _runs(counts) if isinstance(counts, str | bytes) else counts
    whole = all(isinstance(run, int) and not isinstance(run, bool) and run >= 0 for run in runs)
    if not whole or sum(runs) != hw[0] * hw[1]:
        msg = f"run lengths of a segmentation must be 0 or more and sum to {hw[0]} x {hw[1]}, got {_short(counts)}: "
        raise TileError(msg + "correct or remove the annotation")
    values = np.arange(len(runs)) % 2
    return np.repeat(values.astype(np.uint8), runs).reshape(hw, order="F")


def _polygon(points: Any, hw: tuple[int, int]) -> list[float]:
    """The numbers of a polygon, cut to one image's size around the image."""
    good = (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(value, int | float) and abs(value) < 1e300 for value in points)
    )
    if not good:
        wanted = "a polygon must be an even number, 6 or more, of finite numbers [x0, y0, x1, y1, ...]"
        msg = f"{wanted}, got {_short(points)}: correct or remove the annotation"
        raise TileError(msg)
    height, width = hw
    limits = np.tile([width, height], len(points) // 2)
    return np.clip(np.array(points, np.float64), -limits, 2.0 * limits).tolist()


def _runs(counts: str | bytes) -> list[int]:
    """COCO's compressed run lengths -> run lengths: 5 bits a character, from the second after next as differences."""
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else [-1]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_mask_of(counts: bytes, hw: tuple[int, int]) -> bool:
    """Whether compressed run lengths are of a mask of (height, width): without decoding, whatever the bytes are."""
    runs = _runs(counts)
    return min(runs, default=-1) >= 0 and sum(runs) == hw[0] * hw[1]


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
    return encode_mask(np.asfortranarray(mask[rows[:, None], columns]))


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
    return encode_mask(mask)


def encode_mask(mask: np.ndarray) -> bytes:
    """[h, w] uint8 in Fortran order -> compressed run lengths."""
    counts = coco_mask.encode(mask)["counts"]
    # The stubs allow for text, which only a mask read from JSON has.
    assert isinstance(counts, bytes)
    return counts
