"""What one image came to, in the shape that users of SAHI know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from scalenet_ray.core import storage
from scalenet_ray.core.coco import to_results
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.interchange import to_supervision
from scalenet_ray.core.merge import merge_detections
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import Step

if TYPE_CHECKING:
    import supervision  # pyright: ignore[reportMissingImports]

__all__ = ["BoundingBox", "Category", "ObjectPrediction", "ScaledPrediction", "Score"]


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
    """How sure the detector is, in [0, 1]."""

    value: float


class ObjectPrediction(NamedTuple):
    """One object.

    Attributes:
        bbox: in image pixels.
        category: id and name.
        score: in [0, 1].
        depth: how often the image was zoomed into to find it; 0 for the whole image.
    """

    bbox: BoundingBox
    category: Category
    score: Score
    depth: int


@dataclass(frozen=True, eq=False)
class ScaledPrediction:
    """What `get_scaled_prediction` found in an image, and on what way.

    Attributes:
        pixels: [h, w, 3] uint8 RGB, the image as it was looked at (upright, 8 bits).
        detections: merged, in image pixels, the best first.
        categories: category id -> name.
        policy: what was followed.
        steps: what became of each tile, in order.
        detector_passes: what it cost, in passes over the whole image.
        durations_in_seconds: "prediction": all of it, the networks' loading left out.
    """

    pixels: np.ndarray
    detections: Detections
    categories: Mapping[int, str]
    policy: Policy
    steps: tuple[Step, ...]
    detector_passes: float
    durations_in_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The image as Pillow knows it."""
        return Image.fromarray(self.pixels)

    @property
    def image_height(self) -> int:
        """In pixels."""
        return self.pixels.shape[0]

    @property
    def image_width(self) -> int:
        """In pixels."""
        return self.pixels.shape[1]

    @cached_property
    def object_prediction_list(self) -> list[ObjectPrediction]:
        """The objects, the best first."""
        found = self.detections
        columns = (found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), found.depth.tolist())
        return [
            ObjectPrediction(BoundingBox(*box), Category(label, self.categories[label]), Score(score), depth)
            for box, label, score, depth in zip(*columns, strict=True)
        ]

    def found_in_whole_image(self, confidence_threshold: float) -> Detections:
        """What the pass over the whole image gave by itself: what there would be without the recursion.

        Args:
            confidence_threshold: detections that score less are left out.
        """
        whole = (0, 0, self.image_width, self.image_height)
        passes = [step for step in self.steps if step.result.detector_pixels and step.tile.window.xyxy == whole]
        found = merge_detections([step.result.detections for step in passes[:1]], self.policy.merging)
        return found[found.scores >= confidence_threshold]

    def to_coco_predictions(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """The objects as COCO results, each with its category's name and its area in square image pixels.

        Args:
            image_id: the image's id in its data set; None if it has none.
        """
        found = self.detections
        rows = to_results(0, found, (self.image_height, self.image_width))
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
        """The objects as `supervision.Detections`; see `core.interchange.to_supervision`."""
        return to_supervision(self.detections, self.categories, (self.image_height, self.image_width))

    def export_visuals(
        self,
        export_dir: str,
        text_size: float | None = None,
        rect_th: float | None = None,
        hide_labels: bool = False,
        hide_conf: bool = False,
        file_name: str = "prediction_visual",
    ) -> str:
        """Write the image with its boxes, at its own size: those that came with the recursion in another colour.

        Args:
            export_dir: folder or s3:// prefix.
            text_size: in points at 100 dots an inch; None for 7.
            rect_th: the lines' width, in points; None for 1.5.
            hide_labels: no text at all.
            hide_conf: no scores.
            file_name: without its suffix, which is .png.

        Returns:
            The file's address.
        """
        from scalenet_ray.recursion_picture import NEW, SEEN, draw_boxes, picture_bytes
        from scalenet_ray.svg import drawing

        objects = [] if hide_labels else self.object_prediction_list
        texts = [one.category.name + ("" if hide_conf else f" {one.score.value:.2f}") for one in objects]
        colours = [NEW if depth else SEEN for depth in self.detections.depth.tolist()]
        with drawing(self.image_width / 100, self.image_height / 100) as figure:
            figure.set_layout_engine("none")
            axes = figure.add_axes((0, 0, 1, 1))
            style = {"line_width": rect_th or 1.5, "text_size": text_size or 7.0}
            draw_boxes(axes, self.pixels, self.detections, colours, texts=texts, **style)
            uri = storage.join(export_dir, f"{file_name}.png")
            storage.write_bytes_atomic(uri, picture_bytes(figure, "png", 100.0))
        return uri
