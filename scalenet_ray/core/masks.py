"""Instance masks: COCO segmentations, and run-length encodings on tiles, windows and images."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from scalenet_ray.core.errors import TileError
from scalenet_ray.core.geometry import Tile, Window, resample_nearest

# pycocotools counts pixels in 32-bit integers.
_MAX_PIXELS = 2**31


def checked_segmentation(segmentation: Any, hw: tuple[int, int] | None) -> Any:
    """Validate a COCO segmentation, so that pycocotools can decode it safely.

    pycocotools' C code does not check its input: a point far outside the image takes gigabytes of memory, and run
    lengths past the end are written out of bounds.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in image pixels, or {"size": [height, width], "counts":
            run lengths as a list or as compressed text}.
        hw: (height, width) of the image; None if unknown: run lengths are then checked against their own size.

    Returns:
        Polygons, clipped to within one image size of the image if `hw` is given; or {"size", "counts"} unchanged.

    Raises:
        TileError: if the segmentation is invalid.
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
    whole = pixels < _MAX_PIXELS and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != pixels:
        wanted = f"run lengths of a segmentation must be 0 or more and sum to {size[0]} x {size[1]}"
        msg = f"{wanted}, got {_short(counts)}: correct or remove the annotation"
        raise TileError(msg)
    return {"size": list(size), "counts": counts}


def mask_of_segmentation(segmentation: Any, hw: tuple[int, int]) -> np.ndarray:
    """Decode a COCO segmentation to a mask of the image.

    Args:
        segmentation: polygons or run lengths, see `checked_segmentation`.
        hw: (height, width) of the image.

    Returns:
        [h, w] uint8, 0 or 1.

    Raises:
        TileError: if the segmentation is invalid.
    """
    checked = checked_segmentation(segmentation, hw)
    if isinstance(checked, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(checked, *hw)))
    counts = checked["counts"]
    runs = _runs(counts) if isinstance(counts, str | bytes) else counts
    values = np.arange(len(runs)) % 2
    return np.repeat(values.astype(np.uint8), runs).reshape(hw, order="F")


def _polygon(points: Any, hw: tuple[int, int] | None) -> list[float]:
    """Validate a polygon, and clip it to within one image size of the image if `hw` is given."""
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
    """Convert a list of numbers to [N] float64; return None for anything else, numbers as text included."""
    if not isinstance(points, list):
        return None
    try:
        array = np.array(points)
    except (ValueError, OverflowError):  # Nested lists of different lengths.
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        return None
    return array.astype(np.float64)


def _runs(counts: str | bytes) -> list[int]:
    """Decode COCO's compressed run lengths; return [-1] if they are invalid.

    Each character holds 5 bits; from the fourth run on, a run is the difference from the run two before it.
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
    # More than 12 characters of 5 bits exceed any number of pixels; up to 12, sums are exact in 64 bits.
    if digits.max() > 12:
        return [-1]
    places = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16 != 0, np.int64(1) << (5 * digits), 0)
    if np.abs(values).max() >= _MAX_PIXELS:
        return [-1]
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs.tolist()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_mask_of(counts: bytes, hw: tuple[int, int]) -> bool:
    """Return True if compressed run lengths are valid and of a (height, width) mask, without decoding the mask."""
    runs = _runs(counts)
    return min(runs, default=-1) >= 0 and sum(runs) == hw[0] * hw[1]


def mask_of_window(counts: bytes, tile: Tile) -> bytes:
    """Resample a mask from a tile to the pixels of its window.

    Args:
        counts: compressed run lengths of a [tile.height, tile.width] mask.
        tile: the tile.

    Returns:
        Compressed run lengths of a [window.height, window.width] mask (see `resample_nearest`).
    """
    mask = coco_mask.decode({"size": [tile.height, tile.width], "counts": counts})
    return encode_mask(np.asfortranarray(resample_nearest(mask, (tile.window.height, tile.window.width))))


def mask_of_image(counts: bytes, window: Window, image_hw: tuple[int, int]) -> bytes:
    """Place a window's mask on the whole image.

    Args:
        counts: compressed run lengths of a [window.height, window.width] mask.
        window: the window, in image pixels.
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
    """Encode a mask, [h, w] uint8 in Fortran order, to compressed run lengths."""
    counts = coco_mask.encode(mask)["counts"]
    # The type stubs also allow text.
    assert isinstance(counts, bytes)
    return counts
