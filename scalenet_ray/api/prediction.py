"""Predictions on images: the objects found, with conversions to other tools' formats, pictures and crops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import AnyImage, whole_pixels
from scalenet_ray.data import storage
from scalenet_ray.data.formats import decoded_masks, to_results, to_supervision
from scalenet_ray.report.pictures import PICTURE_SIDE, crop, draw_objects, encoded

if TYPE_CHECKING:
    import supervision  # pyright: ignore[reportMissingImports]

_NOTEBOOK_SIDE = 1200
_QUALITY = 92
_MOST_CLASSES = 5
_MOST_DRAWN = 1000


class BoundingBox(NamedTuple):
    """A box, in image pixels."""

    minx: float
    miny: float
    maxx: float
    maxy: float

    def to_xyxy(self) -> list[float]:
        """[minx, miny, maxx, maxy], in image pixels."""
        return list(self)


class Category(NamedTuple):
    """A category: its id and its name."""

    id: int
    name: str


class Score(NamedTuple):
    """Confidence score, in [0, 1]."""

    value: float


class ObjectPrediction(NamedTuple):
    """One object.

    Attributes:
        bbox: in image pixels.
        category: id and name.
        score: in [0, 1].
        depth: zoom depth of the tile that it was found in; 0 for the whole image.
    """

    bbox: BoundingBox
    category: Category
    score: Score
    depth: int


class Prediction:
    """Objects found in one image.

    Attributes:
        pixels: [h, w, 3] uint8 RGB, the decoded image (upright, 8 bits); of a large TIFF its windows, read on demand.
        detections: merged, in image pixels, the best first.
        categories: category id -> name.
    """

    pixels: AnyImage
    detections: Detections
    categories: Mapping[int, str]

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width), in pixels."""
        height, width = self.pixels.shape[:2]
        return height, width

    @property
    def image(self) -> Image.Image:
        """The image as a Pillow image; one that is read by window is reduced, to a longer side of 4096 or more."""
        return Image.fromarray(whole_pixels(self.pixels, PICTURE_SIDE))

    @property
    def image_height(self) -> int:
        """In pixels."""
        return self.image_hw[0]

    @property
    def image_width(self) -> int:
        """In pixels."""
        return self.image_hw[1]

    @cached_property
    def object_prediction_list(self) -> list[ObjectPrediction]:
        """The objects, the best first."""
        found = self.detections
        columns = (found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), found.depth.tolist())
        return [
            ObjectPrediction(BoundingBox(*box), Category(label, self.categories[label]), Score(score), depth)
            for box, label, score, depth in zip(*columns, strict=True)
        ]

    def to_coco_predictions(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """The objects as COCO results, each with its category's name and its area in square image pixels.

        Args:
            image_id: the image's id in its data set; None if it has none.
        """
        found = self.detections
        rows = to_results(0, found, self.image_hw)
        return [
            {
                **row,
                "image_id": image_id,
                "category_name": self.categories[row["category_id"]],
                "iscrowd": 0,
                "area": round(area, 3),
            }
            for row, area in zip(rows, found.areas.tolist(), strict=True)
        ]

    def to_coco_annotations(self) -> list[dict[str, Any]]:
        """The objects as COCO annotations: as `to_coco_predictions`, without scores."""
        return [{key: row[key] for key in row if key != "score"} for row in self.to_coco_predictions()]

    def to_supervision(self) -> supervision.Detections:
        """The objects as `supervision.Detections`; see `data.formats.to_supervision`."""
        return to_supervision(self.detections, self.categories, self.image_hw)

    @property
    def masks(self) -> np.ndarray | None:
        """[N, height, width] bool, the objects' masks; None if the detector has none."""
        return decoded_masks(self.detections, self.image_hw)

    def crops(self, margin: float = 0.0) -> list[np.ndarray]:
        """Cut out each object: N arrays [h, w, 3] uint8 RGB at the image's own resolution, in the objects' order.

        Args:
            margin: added on every side, as a share of the box's side; clipped at the image's border.

        Raises:
            UserError: if the margin is negative.
        """
        if not margin >= 0:
            msg = f"margin must be 0 or more, got {margin}: crops hold their objects whole"
            raise UserError(msg)
        pixels = self.pixels
        return [crop(pixels, box, margin) for box in self.detections.boxes.tolist()]

    def plot(
        self, *, labels: bool = True, scores: bool = True, line_width: int | None = None, text_size: int | None = None
    ) -> Image.Image:
        """Draw the objects on the image, those found by the recursion in another colour.

        Args:
            labels: write the categories' names.
            scores: write the scores behind the names.
            line_width: of the boxes, in pixels; None for one that suits the image.
            text_size: in pixels; None for one that suits the image.

        Raises:
            UserError: if a width or a size is no whole number of 1 or more, or too large.
        """
        for name, value in (("line_width", line_width), ("text_size", text_size)):
            if value is not None and not (isinstance(value, int) and 1 <= value <= _MOST_DRAWN):
                msg = f"{name} must be 1 to {_MOST_DRAWN} whole pixels, or None for what suits the image, got {value!r}"
                raise UserError(msg)
        found, categories = self.detections, self.categories
        return draw_objects(self.image, self.image_width, found, categories, labels, scores, line_width, text_size)

    def export_visuals(
        self,
        export_dir: str,
        text_size: float | None = None,
        rect_th: int | None = None,
        hide_labels: bool = False,
        hide_conf: bool = False,
        file_name: str = "prediction_visual",
        export_format: str = "png",
    ) -> str:
        """Write the image with its boxes drawn, see `plot`.

        Args:
            export_dir: folder, local or in a store.
            text_size: in pixels; None for one that suits the image.
            rect_th: the lines' width, in pixels; None for one that suits the image.
            hide_labels: no text at all.
            hide_conf: no scores.
            file_name: without its suffix.
            export_format: png, jpg or another format that Pillow writes; it is the suffix.

        Returns:
            The file's address.
        """
        size = None if text_size is None else round(text_size)
        picture = self.plot(labels=not hide_labels, scores=not hide_conf, line_width=rect_th, text_size=size)
        uri = storage.join(export_dir, f"{file_name}.{export_format}")
        image_format = "jpeg" if export_format == "jpg" else export_format
        quality = {"quality": _QUALITY} if image_format.lower() == "jpeg" else {}
        storage.write_bytes_atomic(uri, encoded(picture, image_format, **quality))
        return uri

    def in_words(self) -> str:
        """The number of objects, and the most frequent categories."""
        counts = Counter(self.categories[label] for label in self.detections.labels.tolist())
        listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(_MOST_CLASSES))
        more = f" and {len(counts) - _MOST_CLASSES} categories more" if len(counts) > _MOST_CLASSES else ""
        total = len(self.detections)
        return f"{total} object{'' if total == 1 else 's'}" + (f": {listed}{more}" if listed else "")

    def __repr__(self) -> str:
        """One line: what was found, and the image's size."""
        return f"{type(self).__name__}({self.in_words()}; {self.image_width} x {self.image_height} pixels)"

    def _repr_png_(self) -> bytes:
        """Picture of the objects for a notebook."""
        image = self.image
        image.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
        return encoded(draw_objects(image, self.image_width, self.detections, self.categories), "png")
