"""Canvases: a picture of one object, resized, in the middle of a black square (sections 'MNIST' and 'CIFAR-10')."""

from __future__ import annotations

from typing import Literal, get_args

import cv2
import numpy as np
from PIL import Image

__all__ = ["Resampling", "centred", "resized"]

Resampling = Literal["bicubic", "bilinear", "area", "nearest", "bicubic-aliased", "bilinear-aliased"]
"""How pictures change their size. Pillow's first three see every pixel when they shrink; the others skip some."""

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
_OPENCV = {"bicubic-aliased": cv2.INTER_CUBIC, "bilinear-aliased": cv2.INTER_LINEAR}


def resized(picture: np.ndarray, side: int, method: Resampling = "bicubic") -> np.ndarray:
    """A square picture at another size.

    Args:
        picture: [s, s, 3] uint8.
        side: pixels along each side of the result.
        method: how.

    Returns:
        [side, side, 3] uint8; the picture itself if it has that size.

    Raises:
        ValueError: if there is no such method, or no pixel would be left.
    """
    if method not in get_args(Resampling):
        msg = f"resampling must be one of {', '.join(get_args(Resampling))}, got {method!r}"
        raise ValueError(msg)
    if side < 1:
        msg = f"a canvas must have a side of 1 pixel or more, got {side}"
        raise ValueError(msg)
    if picture.shape[:2] == (side, side):
        return picture
    if method in _OPENCV:
        return cv2.resize(picture, (side, side), interpolation=_OPENCV[method])
    return np.asarray(Image.fromarray(picture).resize((side, side), _PILLOW[method]))


def centred(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture in the middle of a black canvas, or the middle of it where it is larger.

    Args:
        picture: [s, s, 3] uint8. Where s and `side` differ by an odd number, the middle is half a pixel off.
        side: pixels along each side of the canvas.

    Returns:
        [side, side, 3] uint8.
    """
    have = picture.shape[0]
    if have >= side:
        start = (have - side) // 2
        return picture[start : start + side, start : start + side]
    canvas = np.zeros((side, side, picture.shape[2]), np.uint8)
    start = (side - have) // 2
    canvas[start : start + have, start : start + have] = picture
    return canvas
