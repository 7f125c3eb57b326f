"""Pictures of found objects: boxes drawn on an image, and objects cut out of it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import AnyImage, Window, whole_pixels, window_pixels
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecord, OpenImage

SEEN, NEW = "#56b4e9", "#e69f00"
"""Colours of the boxes found in the whole image alone, and of the boxes added by the recursion."""

PICTURE_SIDE = 4096
"""An image that is read by window is drawn reduced, to a longer side of so many pixels or more."""

_SIDES_PER_LINE = 800
_SIDES_PER_TEXT = 110
_LEAST_TEXT = 11

_THREADS = 2
_MOST_WAITING = 32
_QUALITY = 90


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

    `picture` is RGB, the image of `image_width` pixels or a reduced one; it is drawn on, and returned. Widths and sizes
    are in its pixels; None for those that suit it.
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
    """Cut a box, xyxy in image pixels, out of an image: [h, w, 3] uint8 RGB, at least one pixel.

    `margin` is added on every side, as a share of the box's side; it is clipped at the image's border.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    more_x, more_y = margin * (x1 - x0), margin * (y1 - y0)
    left, top = int(np.clip(x0 - more_x, 0, width - 1)), int(np.clip(y0 - more_y, 0, height - 1))
    right = int(np.clip(np.ceil(x1 + more_x), left + 1, width))
    bottom = int(np.clip(np.ceil(y1 + more_y), top + 1, height))
    return window_pixels(image, Window(left, top, right, bottom))


def encoded(picture: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes of a picture's file; raises `UserError` if Pillow writes no such format."""
    sink = io.BytesIO()
    try:
        picture.save(sink, image_format, **options)
    except KeyError as error:
        msg = f"a picture must have a format that Pillow writes, e.g. png or jpg, got {image_format!r}: give another"
        raise UserError(msg) from error
    return sink.getvalue()


class SavedPictures:
    """Writer of pictures/ID-NAME.jpg, the image with its boxes, and crops/CLASS/ID-NAME-NUMBER.jpg, each object.

    A context manager: threads of this process read the images again, draw and write; the block ends when all is
    written. What is there already is not written again.

    Attributes:
        failed: (file, reason) of the images whose pictures could not be written.
    """

    def __init__(
        self,
        run_uri: str,
        open_image: OpenImage,
        categories: Mapping[int, str],
        *,
        pictures: bool,
        crops: bool,
        min_score: float,
    ) -> None:
        self._run_uri, self._open_image, self._categories = run_uri, open_image, categories
        self._pictures, self._crops, self._min_score = pictures, crops, min_score
        self._pool = ThreadPoolExecutor(_THREADS, "pictures")
        self._waiting: list[tuple[str, Future[None]]] = []
        self.failed: list[tuple[str, str]] = []

    def __enter__(self) -> SavedPictures:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits; after an error in the block, drop it."""
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            self._collect(0)

    def add(self, record: ImageRecord, hw: tuple[int, int] | None, detections: Detections) -> None:
        """Write the pictures of an image of (height, width) with its detections; waits while many others wait."""
        if not (self._pictures or self._crops):
            return
        self._collect(_MOST_WAITING)
        found = detections[detections.scores >= self._min_score]
        self._waiting.append((record.file_name, self._pool.submit(self._write, record, hw, found)))

    def _collect(self, most: int) -> None:
        """Wait until at most so many images wait."""
        while len(self._waiting) > most:
            file, future = self._waiting.pop(0)
            try:
                future.result()
            except (TileError, OSError) as error:
                self.failed.append((file, error.reason if isinstance(error, TileError) else str(error)))

    def _write(self, record: ImageRecord, hw: tuple[int, int] | None, found: Detections) -> None:
        stem = record.file_name.rpartition("/")[2].rpartition(".")[0] or record.file_name
        name = f"{record.image_id:06d}-{stem}"
        picture = storage.join(self._run_uri, "pictures", f"{name}.jpg")
        crops = [
            storage.join(self._run_uri, "crops", _folder_of(self._categories[label]), f"{name}-{i}.jpg")
            for i, label in enumerate(found.labels.tolist())
        ]
        draws = self._pictures and not storage.exists(picture)
        # Crops are written in order: if the last is there, all are.
        cuts = self._crops and bool(crops) and not storage.exists(crops[-1])
        if not (draws or cuts):
            return
        image = self._open_image(record)
        if image.shape[:2] != hw:
            msg = f"the image is another one by now: its (height, width) was {hw}, is {image.shape[:2]}"
            raise TileError(msg)
        if cuts:
            for uri, box in zip(crops, found.boxes.tolist(), strict=True):
                _write_jpeg(uri, Image.fromarray(crop(image, box)))
        if draws:
            shown = Image.fromarray(whole_pixels(image, PICTURE_SIDE))
            _write_jpeg(picture, draw_objects(shown, image.shape[1], found, self._categories))


def _folder_of(category: str) -> str:
    """A folder's name for a category: without slashes, and without the dots that would hide it or lead out."""
    return re.sub(r"^\.+|[/\0]", "_", category)


def _write_jpeg(uri: str, picture: Image.Image) -> None:
    storage.write_bytes_atomic(uri, encoded(picture, "JPEG", quality=_QUALITY))
