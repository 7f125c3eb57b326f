"""Pictures of found objects: boxes drawn on an image, and objects cut out of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scalenet_ray.core.geometry import AnyImage, Window, window_pixels

__all__ = ["NEW", "SEEN", "crop", "draw_objects"]

SEEN, NEW = "#56b4e9", "#e69f00"
"""Colours of the boxes found in the whole image alone, and of the boxes added by the recursion."""

_SIDES_PER_LINE = 800
_SIDES_PER_TEXT = 110
_LEAST_TEXT = 11


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    colours: Sequence[str],
    texts: Sequence[str] = (),
    line_width: int | None = None,
    text_size: int | None = None,
) -> Image.Image:
    """Draw boxes on a copy of an image, the first ones on top.

    Args:
        image: RGB.
        boxes: [N, 4] xyxy in pixels of `image`.
        colours: colour of each box.
        texts: label of each box; () for none.
        line_width: in pixels; None for one that suits the image.
        text_size: in pixels; None for one that suits the image.
    """
    picture = image.copy()
    longer = max(picture.size)
    width = line_width or max(2, round(longer / _SIDES_PER_LINE))
    font = ImageFont.load_default(text_size or max(_LEAST_TEXT, round(longer / _SIDES_PER_TEXT)))
    draw = ImageDraw.Draw(picture)
    for box, colour in zip(boxes.tolist(), colours, strict=True):
        draw.rectangle(box, outline=colour, width=width)
    labels = list(zip(boxes.tolist(), texts, colours, strict=False))
    for (x0, y0, _, _), text, colour in reversed(labels):
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        left, top = max(0.0, min(x0, picture.width - right - 4)), max(0.0, y0 - bottom - 2)
        draw.rectangle((left, top, left + right + 4, top + bottom + 2), fill=colour)
        draw.text((left + 2, top), text, fill="black", font=font)
    return picture


def crop(image: AnyImage, box: Sequence[float], margin: float = 0.0) -> np.ndarray:
    """Cut a box out of an image: [h, w, 3] uint8 RGB, at least one pixel.

    Args:
        image: the image.
        box: xyxy in image pixels.
        margin: added on every side, as a share of the box's side; clipped at the image's border.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    more_x, more_y = margin * (x1 - x0), margin * (y1 - y0)
    left, top = int(np.clip(x0 - more_x, 0, width - 1)), int(np.clip(y0 - more_y, 0, height - 1))
    right = int(np.clip(np.ceil(x1 + more_x), left + 1, width))
    bottom = int(np.clip(np.ceil(y1 + more_y), top + 1, height))
    return window_pixels(image, Window(left, top, right, bottom))
