"""Figure of a recursion, as the paper's Figures 1 and 2: image, scale maps, windows, boxes before and after."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.expansion import planning_weights
from scalenet_ray.core.geometry import AnyImage, fit_longer_side, whole_pixels
from scalenet_ray.core.policy import Policy
from scalenet_ray.core.recursion import Step
from scalenet_ray.evaluation.compare import are_new
from scalenet_ray.report.charts import drawing
from scalenet_ray.report.pictures import NEW, SEEN

_HEAT = np.array([230, 159, 0], np.float32)
_DIMMED = 0.35
_LONGEST_SIDE = 1200
_PANEL_INCHES = 4.2
_TEXT_POINTS = 7.0
_TALLEST = 4.0
"""Most height of a panel, in its width: of a tall strip it leaves the sides empty."""


def draw_look(axes: Axes, image: AnyImage, steps: Sequence[Step], policy: Policy) -> None:
    """Draw the darkened image, the out-of-range cells of the scale maps of a policy's steps, and the windows."""
    shown = whole_pixels(image, _LONGEST_SIDE).astype(np.float32) * _DIMMED
    scale_y, scale_x = shown.shape[0] / image.shape[0], shown.shape[1] / image.shape[1]
    for step in steps:
        if step.scale_map is None:
            continue
        window = step.tile.window
        weights = planning_weights(step.tile, step.scale_map, policy)
        rows = slice(int(window.y0 * scale_y), math.ceil(window.y1 * scale_y))
        columns = slice(int(window.x0 * scale_x), math.ceil(window.x1 * scale_x))
        heat = cv2.resize(weights, shown[rows, columns].shape[1::-1])[..., None]
        shown[rows, columns] = shown[rows, columns] * (1 - heat) + _HEAT * heat
    _draw_image(axes, np.clip(shown, 0, 255).astype(np.uint8), (image.shape[0], image.shape[1]))
    for step in steps:
        for child in step.children:
            _rectangle(axes, child.window.xyxy, "white", 2.0)


def draw_boxes(
    axes: Axes,
    image: AnyImage,
    found: Detections,
    colours: Sequence[str],
    *,
    texts: Sequence[str] = (),
    line_width: float = 1.5,
) -> None:
    """Draw an image with boxes in image pixels, each of its colour, with a label if there are texts."""
    _draw_image(axes, whole_pixels(image, _LONGEST_SIDE), (image.shape[0], image.shape[1]))
    for box, colour in zip(found.boxes.tolist(), colours, strict=True):
        _rectangle(axes, box, colour, line_width)
    for box, text, colour in zip(found.boxes.tolist(), texts, colours, strict=False):
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
        # Category names are plain text, not matplotlib formulas.
        axes.text(box[0], box[1], text, fontsize=_TEXT_POINTS, va="bottom", bbox=label, clip_on=True, parse_math=False)


def _draw_image(axes: Axes, shown: np.ndarray, image_hw: tuple[int, int]) -> None:
    """Draw an image of `image_hw` (height, width), or a reduced copy of it, in image pixels."""
    height, width = image_hw
    if max(shown.shape) > _LONGEST_SIDE:
        shown_hw = fit_longer_side(shown.shape[0], shown.shape[1], _LONGEST_SIDE)
        shown = cv2.resize(shown, shown_hw[::-1], interpolation=cv2.INTER_AREA)
    axes.imshow(shown, extent=(0, width, height, 0), interpolation="bicubic")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()


def _rectangle(axes: Axes, xyxy: Sequence[float], colour: str, line_width: float) -> None:
    x0, y0, x1, y1 = xyxy
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=line_width))


def recursion_figure(
    image: AnyImage,
    steps: Sequence[Step],
    policy: Policy,
    before: Detections,
    after: Detections,
    names: Mapping[int, str] | None = None,
) -> Figure:
    """Draw the recursion side by side: the image, the scale maps and windows of each depth, the boxes before and after.

    `before` are the boxes of the whole image alone, in image pixels; new ones in `after` have another colour. `names`
    label the boxes.
    """
    depths = sorted({step.tile.depth for step in steps if step.scale_map is not None or step.children})
    count = len(depths) + 3
    aspect = min(image.shape[0] / image.shape[1], _TALLEST)
    rows = 1 if count <= 4 else 2
    columns = -(-count // rows)
    with drawing(_PANEL_INCHES * columns, (_PANEL_INCHES * aspect + 0.4) * rows) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in panels:
            axes.set_axis_off()
        _draw_image(panels[0], whole_pixels(image, _LONGEST_SIDE), (image.shape[0], image.shape[1]))
        panels[0].set_title(f"{image.shape[1]} x {image.shape[0]} pixels")
        for axes, depth in zip(panels[1:], depths, strict=False):
            at_depth = [step for step in steps if step.tile.depth == depth]
            draw_look(axes, image, at_depth, policy)
            asked = sum(len(step.children) for step in at_depth)
            axes.set_title(f"depth {depth}: {asked} window{'' if asked == 1 else 's'} asked for")
        new = are_new(after, before)
        labels = {name: _labels(found, names) for name, found in (("before", before), ("after", after))}
        draw_boxes(panels[count - 2], image, before, [SEEN] * len(before), texts=labels["before"])
        panels[count - 2].set_title(f"the whole image alone: {len(before)} found")
        colours = [NEW if is_new else SEEN for is_new in new.tolist()]
        draw_boxes(panels[count - 1], image, after, colours, texts=labels["after"])
        panels[count - 1].set_title(f"with {policy.name}: {len(after)} found, {int(new.sum())} new")
        return figure


def _labels(found: Detections, names: Mapping[int, str] | None) -> list[str]:
    return [] if names is None else [names[label] for label in found.labels.tolist()]


def picture_kind(suffix: str) -> str:
    """The kind of a picture, png, svg or pdf, by its suffix with or without its dot; raises `UserError` for others."""
    kind = suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        msg = f"a picture is written as .png, .svg or .pdf, got {suffix!r}: name the output so"
        raise UserError(msg)
    return kind


def picture_bytes(figure: Figure, suffix: str, dots_per_inch: float = 110.0) -> bytes:
    """Render a figure as png, svg or pdf; raises `UserError` for another suffix."""
    kind = picture_kind(suffix)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=dots_per_inch, metadata={"CreationDate": None} if kind == "pdf" else None)
    return drawn.getvalue()
