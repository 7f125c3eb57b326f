"""Images that Python code hands over: addresses, pixels, encoded bytes, or rows of a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.data.image_records import ImageRecord, ImageRecords, OpenImage
from scalenet_ray.data.images import decode_image, to_rgb
from scalenet_ray.runs.batch import image_opener
from scalenet_ray.runs.local import Session
from scalenet_ray.workflows.image_sets import ImageSet, open_images

OneImage = str | os.PathLike[str] | bytes | np.ndarray | Image.Image
Images = OneImage | Iterable[OneImage | Mapping[str, Any] | Sequence[Any]]
"""Images of `scalenet_ray.detect`; also data sets of torch, and `ray.data.Dataset`."""

_COLUMNS = ("image", "uri", "path", "file_name")
_MAX_PIXELS = 200_000_000
_NAME = "images"
"""Name of images that are not listed from one folder, in the run folder and messages."""


@dataclass(frozen=True)
class InputImages:
    """Images of a run, the other values of the rows that they came in, by id, and whether all have addresses."""

    images: ImageSet
    rows: Mapping[int, Mapping[str, Any]]
    resumable: bool


@dataclass(frozen=True)
class _HeldImages(ImageSet):
    """Images of which some are held in memory: position among the held ones -> value."""

    held: Callable[[int], Any]
    positions: Mapping[int, int]

    @property
    def open_image(self) -> OpenImage:
        """A picklable function that decodes one image."""
        read = image_opener(None, self.max_pixels)
        return partial(_open, held=self.held, positions=self.positions, read=read, max_pixels=self.max_pixels)


def _open(
    record: ImageRecord, held: Callable[[int], Any], positions: Mapping[int, int], read: OpenImage, max_pixels: int
) -> AnyImage:
    """Decode the image of a record."""
    if record.image_id not in positions:
        return read(record)
    value = held(positions[record.image_id])
    if isinstance(value, bytes):
        return decode_image(value, max_pixels=max_pixels)
    return to_rgb(value) if isinstance(value, Image.Image) else value


def collect_images(images: Images, session: Session, column: str | None = None, every: int = 1) -> InputImages:
    """List the images that Python code hands over, see `scalenet_ray.detect`; the engine keeps pixels for its workers.

    Raises:
        UserError: if one is of another type, an array is not [h, w, 3] uint8, there is none, or `every` is under 1.
    """
    if every < 1:
        msg = f"every must be 1, for all images, or more, got {every}: 10 takes each tenth"
        raise UserError(msg)
    if isinstance(images, (str, os.PathLike)):
        listed = open_images(session, os.fspath(images), limit=None, max_megapixels=_MAX_PIXELS / 1e6, every=every)
        return InputImages(listed, {}, resumable=True)
    records: list[ImageRecord] = []
    values: list[Any] = []
    positions: dict[int, int] = {}
    rows: dict[int, Mapping[str, Any]] = {}
    for image_id, item in islice(enumerate(_items(images), start=1), 0, None, every):
        value, row = _value(item, image_id, column)
        if isinstance(value, (str, os.PathLike)):
            records.append(ImageRecord(image_id, os.fspath(value)))
        else:
            positions[image_id] = len(values)
            values.append(value if isinstance(value, (bytes, Image.Image)) else checked_pixels(value))
            records.append(ImageRecord(image_id, f"image {image_id - 1}"))
        if row:
            rows[image_id] = row
    if not records:
        msg = "images must hold at least one image, got none: check what they come from"
        raise UserError(msg)
    held = _HeldImages(_NAME, None, ImageRecords.of(records), (), _MAX_PIXELS, session.hold(values), positions)
    return InputImages(held, rows, resumable=not values)


def _items(images: Any) -> Iterator[Any]:
    if isinstance(images, (bytes, np.ndarray, Image.Image)):
        return iter([images])
    if hasattr(images, "iter_rows"):
        return iter(images.iter_rows())
    if hasattr(images, "columns") and hasattr(images, "to_dict"):
        # The names of its columns, which it iterates over, would be taken for addresses.
        msg = f"images must be rows, got a {type(images).__name__} of columns: give its to_dict('records')"
        raise UserError(msg)
    if isinstance(images, Mapping) or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        msg = f"images must be an address, an image, or an iterable of them, got {type(images).__name__}"
        raise UserError(msg)
    # Data sets of torch have __getitem__ and __len__ alone, and need not end with an IndexError.
    return iter(images) if hasattr(images, "__iter__") else (images[i] for i in range(len(images)))


def _value(item: Any, image_id: int, column: str | None) -> tuple[Any, Mapping[str, Any]]:
    """The image of an item, and the other values of its row."""
    row: Mapping[str, Any] = {}
    if isinstance(item, Mapping):
        name = column or next((name for name in _COLUMNS if name in item), None)
        if name is None or name not in item:
            wanted = column or f"one of {', '.join(_COLUMNS)}"
            msg = f"rows must have a column {wanted} with the image, got {', '.join(map(str, item))}: give column"
            raise UserError(msg)
        row = {key: value for key, value in item.items() if key != name}
        item = item[name]
        # Hugging Face's images that are not decoded.
        if isinstance(item, Mapping) and {"bytes", "path"} >= item.keys() and item:
            item = item["path"] if item.get("bytes") is None else item["bytes"]
    elif isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, (str, os.PathLike, bytes, np.ndarray, Image.Image)):
        return item, row
    msg = (
        f"an image must be an address, [h, w, 3] uint8 RGB, a Pillow image or encoded bytes, got {type(item).__name__} "
        f"as number {image_id - 1}: convert it"
    )
    raise UserError(msg)


def check_threshold(confidence_threshold: float) -> None:
    """Refuse a threshold outside of [0, 1], e.g. in percent, above which nothing scores; raises `UserError`."""
    if not 0.0 <= confidence_threshold <= 1.0:
        msg = f"confidence_threshold must be between 0 and 1, got {confidence_threshold}: divide percentages by 100"
        raise UserError(msg)


def checked_pixels(pixels: np.ndarray) -> np.ndarray:
    """The array itself, if it is [h, w, 3] uint8 and not empty; else raises `UserError`."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        msg = f"an image must be [h, w, 3] uint8 RGB, got shape {list(pixels.shape)} of {pixels.dtype}: convert it"
        raise UserError(msg)
    return pixels
