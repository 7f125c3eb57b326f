"""Pictures of found objects: boxes drawn on an image, and objects cut out of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import AnyImage, Window, window_pixels

SEEN, NEW = "#56b4e9", "#e69f00"
"""Colours of the boxes found in the whole image alone, and of the boxes added by the recursion."""

PICTURE_SIDE = 4096
"""An image that is read by window is drawn reduced, to a longer side of so many pixels or more."""

_SIDES_PER_LINE = 800
_SIDES_PER_TEXT = 110
_LEAST_TEXT = 11


def draw_objects(
    picture: Image.Image,
    image_width: int,
    found: Detections,
    categories: Mapping[int, str],
    labels: bool = True,
    scores: bool = True,
    line_width: int | None = None,
    text_size: int | None = None,
) -> Image.Image:
    """Draw objects on an image, the first ones on top, those found by the recursion in another colour.

    Args:
        picture: RGB, the image or a reduced one; it is drawn on.
        image_width: the image's own, in pixels.
        found: in image pixels.
        categories: category id -> name.
        labels: write the categories' names.
        scores: write the scores behind the names.
        line_width: in pixels; None for one that suits the image.
        text_size: in pixels; None for one that suits the image.

    Returns:
        `picture`.
    """
    boxes = (found.boxes * (picture.width / image_width)).tolist()
    colours = [NEW if depth else SEEN for depth in found.depth.tolist()]
    names = [categories[label] for label in found.labels.tolist()]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist(), strict=True)]
    longer = max(picture.size)
    width = line_width or max(2, round(longer / _SIDES_PER_LINE))
    font = ImageFont.load_default(text_size or max(_LEAST_TEXT, round(longer / _SIDES_PER_TEXT)))
    draw = ImageDraw.Draw(picture)
    for box, colour in zip(boxes, colours, strict=True):
        draw.rectangle(box, outline=colour, width=width)
    shown = list(zip(boxes, texts if scores else names, colours, strict=True)) if labels else []
    for (x0, y0, _, _), text, colour in reversed(shown):
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


def encoded(picture: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes of a picture's file.

    Args:
        picture: the picture.
        image_format: its format, as Pillow names it.
        **options: those of the format.

    Raises:
        UserError: if Pillow writes no such format.
    """
    sink = io.BytesIO()
    try:
        picture.save(sink, image_format, **options)
    except KeyError as error:
        msg = f"a picture must have a format that Pillow writes, e.g. png or jpg, got {image_format!r}: give another"
        raise UserError(msg) from error
    return sink.getvalue()
