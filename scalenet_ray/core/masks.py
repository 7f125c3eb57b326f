"""Instance masks: as annotated, and as run lengths from a tile to its window and to the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, resample_nearest

__all__ = [
    "checked_segmentation",
    "encode_mask",
    "is_mask_of",
    "mask_of_image",
    "mask_of_segmentation",
    "mask_of_window",
]

# pycocotools counts pixels in 32 bits.
_MOST_PIXELS = 2**31


def checked_segmentation(segmentation: Any, hw: tuple[int, int] | None) -> Any:
    """A segmentation as COCO writes it, if pycocotools can read it.

    It is checked here and not left to pycocotools, whose C code believes what it is given: a point far outside costs
    it gigabytes, run lengths past the end are written where they lead.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in image pixels, or {"size": [height, width], "counts":
            run lengths, as a list or as compressed text}.
        hw: (height, width) of the image; None if nobody said: run lengths are then held to their own size.

    Returns:
        Polygons, cut to one image's size around the image where that is known; or {"size", "counts"} as given.

    Raises:
        TileError: if it is damaged.
    """
    if isinstance(segmentation, list) and segmentation:
        return [_polygon(points, hw) for points in segmentation]
    fields: dict[str, Any] = segmentation if isinstance(segmentation, dict) else {}
    counts: Any = fields.get("counts")
    size: Any = fields.get("size")
    sized = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not isinstance(counts, list | str | bytes) or not sized or (hw is not None and tuple(size) != tuple(hw)):
        wanted = "[height, width]" if hw is None else list(hw)
        msg = f'a segmentation must be polygons or {{"size": {wanted}, "counts": ...}}, got {_short(segmentation)}: '
        raise TileError(msg + "correct or remove the annotation")
    runs = _runs(counts) if isinstance(counts, str | bytes) else counts
    pixels = size[0] * size[1]
    whole = pixels < _MOST_PIXELS and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != pixels:
        wanted = f"run lengths of a segmentation must be 0 or more and sum to {size[0]} x {size[1]}"
        msg = f"{wanted}, got {_short(counts)}: correct or remove the annotation"
        raise TileError(msg)
    return {"size": list(size), "counts": counts}


def mask_of_segmentation(segmentation: Any, hw: tuple[int, int]) -> np.ndarray:
    """A segmentation as COCO writes it -> its mask on the image.

    Args:
        segmentation: polygons or run lengths, see `checked_segmentation`.
        hw: (height, width) of the image.

    Returns:
        [h, w] uint8, 0 or 1.

    Raises:
        TileError: if it is damaged.
    """
    checked = checked_segmentation(segmentation, hw)
    if isinstance(checked, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(checked, *hw)))
    counts = checked["counts"]
    runs = _runs(counts) if isinstance(counts, str | bytes) else counts
    values = np.arange(len(runs)) % 2
    return np.repeat(values.astype(np.uint8), runs).reshape(hw, order="F")


def _polygon(points: Any, hw: tuple[int, int] | None) -> list[float]:
    """The numbers of a polygon, cut to one image's size around the image where that is known."""
    numbers = _numbers(points)
    if numbers is None or len(numbers) < 6 or len(numbers) % 2 or not np.isfinite(numbers).all():
        wanted = "a polygon must be an even number, 6 or more, of finite numbers [x0, y0, x1, y1, ...]"
        msg = f"{wanted}, got {_short(points)}: correct or remove the annotation"
        raise TileError(msg)
    if hw is None:
        return points
    limits = np.tile([hw[1], hw[0]], len(numbers) // 2)
    if (numbers >= -limits).all() and (numbers <= 2 * limits).all():
        return points
    return np.clip(numbers, -limits, 2.0 * limits).tolist()


def _numbers(points: Any) -> np.ndarray | None:
    """[N] float64 of a list of numbers; None of anything else, text that reads as numbers included."""
    if not isinstance(points, list):
        return None
    try:
        found = np.array(points)
    except (ValueError, OverflowError):  # Lists of different lengths in it.
        return None
    if found.ndim != 1 or found.dtype.kind not in "iuf":
        return None
    return found.astype(np.float64)


def _runs(counts: str | bytes) -> list[int]:
    """COCO's compressed run lengths -> run lengths: 5 bits a character, from the second after next as differences.

    [-1] if they are none.
    """
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    if not data:
        return []
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return [-1]
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    # More than 12 characters of 5 bits are no number of pixels; with as many, sums stay exact.
    if digits.max() > 12:
        return [-1]
    places = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16 != 0, np.int64(1) << (5 * digits), 0)
    if np.abs(values).max() >= _MOST_PIXELS:
        return [-1]
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs.tolist()


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
    return encode_mask(np.asfortranarray(resample_nearest(mask, (tile.window.height, tile.window.width))))


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
