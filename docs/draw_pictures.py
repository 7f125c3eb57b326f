"""Draw the documentation's pictures into docs/images, with the embedded sample's networks.

Run it with `.venv/bin/python docs/draw_pictures.py`. `large_scene.jpg` shows a scene of the embedded sample's split
large2017, the other pictures show one of val2017.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from scalenet_ray.api import ScaledPrediction, get_scaled_prediction
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.merge import iou_matrix
from scalenet_ray.core.policy import parse_policy
from scalenet_ray.core.recursion import Step
from scalenet_ray.evaluation.compare import are_new
from scalenet_ray.models.detectors import Detector, load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.charts import drawing
from scalenet_ray.report.recursion_figure import NEW, SEEN, draw_boxes, draw_look, picture_bytes, recursion_figure
from scalenet_ray.sample.large_scenes import LARGE_HW, LargeScene, large_scene
from scalenet_ray.sample.scenes import sample_scene

_SHOWN_SCORE = 0.4
_SCENES = 12
_LARGE_SCENES = 8
_LARGE_SHOWN = 4
_LARGE_SCORE = 0.5
_SMALLEST_OBJECT = 12.0
_CROPS = 4
_CROP_HW = (255, 340)
_LOOK, _REGION = "#56b4e9", "#ffb000"
"""Colours of windows."""

_LETTER: dict[str, Any] = {
    "color": "white",
    "fontweight": "bold",
    "path_effects": [withStroke(linewidth=2.5, foreground="#101418")],
}
_IMAGES = Path(__file__).parent / "images"


def _write(name: str, figure: Figure) -> None:
    """Write a figure as a PNG of 256 colours, a third of the bytes."""
    picture = Image.open(io.BytesIO(picture_bytes(figure, "png"))).convert("RGB")
    picture.quantize(256).save(_IMAGES / name, optimize=True)


def _matches(scene: LargeScene, found: Detections) -> np.ndarray:
    """[N, M] bool: which of the N objects each of M boxes matches, by class and an IoU of 0.5."""
    return (iou_matrix(scene.boxes, found.boxes) >= 0.5) & (scene.category_ids[:, None] == found.labels[None])


def _find(detector: Detector, scene: LargeScene, policy_name: str) -> ScaledPrediction:
    policy = parse_policy(
        policy_name,
        input_side=detector.input_side,
        iou_threshold=detector.iou_threshold,
        smallest_object=_SMALLEST_OBJECT,
    )
    return get_scaled_prediction(scene.pixels, detector, policy=policy, confidence_threshold=_LARGE_SCORE, verbose=0)


def _count(scene: LargeScene, prediction: ScaledPrediction) -> dict[str, Any]:
    """Objects found and wrong boxes in a scene, and megapixels computed."""
    matches = _matches(scene, prediction.detections)
    return {
        "policy": prediction.policy.name,
        "objects": len(scene.boxes),
        "found": int(matches.any(axis=1).sum()),
        "wrong": int((~matches.any(axis=0)).sum()),
        "megapixels": sum(step.result.detector_pixels for step in prediction.steps) / 1e6,
    }


def _densest_crops(boxes: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The crops (x0, y0, x1, y1) that hold the most boxes, [N, 4] xyxy; each box counts once."""
    size, crops = np.array(_CROP_HW[::-1]), []
    while len(boxes) and len(crops) < _CROPS:
        starts = (boxes[:, :2] + boxes[:, 2:] - size) / 2
        inside = np.concatenate([starts[:, None] <= boxes[:, :2], starts[:, None] + size >= boxes[:, 2:]], axis=2)
        held = max(np.all(inside, axis=2), key=np.count_nonzero)
        middle = (boxes[held, :2].min(axis=0) + boxes[held, 2:].max(axis=0)) / 2
        x0, y0 = np.clip(middle - size / 2, 0, np.array(LARGE_HW[::-1]) - size).round().astype(int).tolist()
        crops.append((x0, y0, x0 + _CROP_HW[1], y0 + _CROP_HW[0]))
        boxes = boxes[~held]
    return crops


def _outline(axes: Axes, xyxy: Sequence[float], **style: Any) -> None:
    x0, y0, x1, y1 = xyxy
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))


def _draw_found(
    axes: Axes, scene: LargeScene, found: Detections, before: Detections, crop: Sequence[int], line_width: float
) -> None:
    """Draw a part of a scene with boxes: white if the whole image gives them, orange if new, red if wrong."""
    x0, y0, x1, y1 = crop
    axes.imshow(scene.pixels[y0:y1, x0:x1], extent=(x0, x1, y1, y0), interpolation="bicubic")
    axes.set_axis_off()
    right, new = np.any(_matches(scene, found), axis=0), are_new(found, before)
    for box, is_new, is_right in zip(found.boxes, new.tolist(), right.tolist(), strict=True):
        colour = "#ff1f3d" if not is_right else "#ffb000" if is_new else "white"
        under = [withStroke(linewidth=line_width + 1.2, foreground="#101418")]
        grown = box + np.array([-4, -4, 4, 4])
        _outline(axes, grown.tolist(), edgecolor=colour, linewidth=line_width, path_effects=under)
    axes.set_xlim(x0, x1)
    axes.set_ylim(y1, y0)


def _draw_windows(axes: Axes, scene: LargeScene, steps: Sequence[Step]) -> None:
    """Draw a scene with the looks and regions of a recursion."""
    height, width = LARGE_HW
    axes.imshow(cv2.resize(scene.pixels, (1024, 768), interpolation=cv2.INTER_AREA), extent=(0, width, height, 0))
    axes.set_axis_off()
    looks = _looks(steps)
    for step in steps:
        if step.tile.depth:
            colour = _LOOK if step.tile.path in looks else _REGION
            _outline(axes, step.tile.window.xyxy, edgecolor=colour, linewidth=0.8)


def _looks(steps: Sequence[Step]) -> set[tuple[int, ...]]:
    """Paths of the tiles that were cut to look at all that is textured, rather than around an object."""
    blind = [step for step in steps if not step.tile.depth or "nothing_seen" in step.result.guards]
    return {child.path for step in blind for child in step.children}


def _draw_large_scene(scene: LargeScene, whole: ScaledPrediction, zoomed: ScaledPrediction) -> None:
    """Draw what the detector sees in the whole image, the looks and regions, and some of what these found, enlarged."""
    before, found = whole.detections, zoomed.detections
    seen = whole.steps[0].tile
    small = (found.boxes[:, 2:] - found.boxes[:, :2]).max(axis=1) < _CROP_HW[0] / 3
    crops = _densest_crops(found.boxes[are_new(found, before) & small])
    in_whole, in_all = _count(scene, whole), _count(scene, zoomed)
    looks = len(_looks(zoomed.steps))
    width, crop_width = 6.4, 2 * 6.4 / _CROPS
    heights = (width * LARGE_HW[0] / LARGE_HW[1] + 0.3, crop_width * _CROP_HW[0] / _CROP_HW[1])
    with drawing(2 * width, sum(heights)) as figure:
        grid = figure.add_gridspec(2, 2 * _CROPS, height_ratios=heights)
        left, right = (figure.add_subplot(grid[0, i : i + _CROPS]) for i in (0, _CROPS))
        reduced = cv2.resize(scene.pixels, (seen.width, seen.height), interpolation=cv2.INTER_AREA)
        shown = replace(scene, pixels=cv2.resize(reduced, LARGE_HW[::-1], interpolation=cv2.INTER_CUBIC))
        _draw_found(left, shown, before, before, (0, 0, LARGE_HW[1], LARGE_HW[0]), 1.8)
        left.set_title(f"What the detector sees of the whole image: {in_whole['found']} of {len(scene.boxes)} found")
        _draw_windows(right, scene, zoomed.steps)
        windows = f"{looks} looks (blue), {len(zoomed.steps) - looks - 1} regions (orange)"
        right.set_title(f"{windows}: {in_all['found']} found, {in_all['wrong']} wrong")
        for i, crop in enumerate(crops):
            axes, letter = figure.add_subplot(grid[1, 2 * i : 2 * i + 2]), "abcdefgh"[i]
            _draw_found(axes, scene, found, before, crop, 1.5)
            axes.text(0.03, 0.04, letter, transform=axes.transAxes, fontsize=15, **_LETTER)
            _outline(right, crop, edgecolor="white", linewidth=1.6)
            right.text(crop[0], crop[1] - 20, letter, fontsize=13, **_LETTER)
        picture = Image.open(io.BytesIO(picture_bytes(figure, "png", 125.0))).convert("RGB")
        picture.save(_IMAGES / "large_scene.jpg", quality=85, optimize=True)


def _coloured(before: Detections, after: Detections) -> list[str]:
    return [NEW if one else SEEN for one in are_new(after, before).tolist()]


def _look_first(prediction: ScaledPrediction) -> None:
    """Draw the whole image's detections, the scale map with its windows, and the detections after the zoom."""
    image, after = prediction.pixels, prediction.detections
    before = prediction.found_in_whole_image(_SHOWN_SCORE)
    side = 4.2
    with drawing(3 * side + 0.2, side * image.shape[0] / image.shape[1]) as figure:
        left, middle, right = figure.subplots(1, 3)
        draw_boxes(left, image, before, [SEEN] * len(before), line_width=2.0)
        draw_look(middle, image, prediction.steps[:1], prediction.policy)
        draw_boxes(right, image, after, _coloured(before, after), line_width=2.0)
        _write("look_first.png", figure)


def _policies(shown: Sequence[ScaledPrediction]) -> None:
    """Draw the windows of several policies in one scene, with their detector passes."""
    image = shown[0].pixels
    side = 3.4
    with drawing(side * len(shown), side * image.shape[0] / image.shape[1] + 0.4) as figure:
        for axes, prediction in zip(figure.subplots(1, len(shown)), shown, strict=True):
            asking: list[Step] = [step for step in prediction.steps if step.children]
            draw_look(axes, image, asking, prediction.policy)
            axes.set_title(f"{prediction.policy.name}: {prediction.detector_passes:.0f} passes")
        _write("policies.png", figure)


def main() -> None:
    """Draw a large scene, and the scene among the val split's first in which the recursion finds most new objects."""
    detector = load_detector(SAMPLE_DETECTOR)
    for i in range(_LARGE_SCENES):
        large = large_scene(i)
        whole, sliced, zoomed = (_find(detector, large, name) for name in ("whole", "slices@192", "regions"))
        for prediction in (whole, sliced, zoomed):
            print(json.dumps({"large scene": i, **_count(large, prediction)}))
        if i == _LARGE_SHOWN:
            _draw_large_scene(large, whole, zoomed)
    net = NetworkSpec(scale_net=SAMPLE_SCALE_NET).load_scale_net()
    predict = partial(
        get_scaled_prediction,
        detection_model=detector,
        scale_net=net,
        confidence_threshold=_SHOWN_SCORE,
        verbose=0,
    )
    gains = []
    for i in range(_SCENES):
        scene = sample_scene("val2017", i)
        prediction = predict(scene.pixels)
        before = prediction.found_in_whole_image(_SHOWN_SCORE)
        gains.append((int(are_new(prediction.detections, before).sum()), i, prediction))
    gain, scene, prediction = max(gains, key=lambda row: row[:2])
    before = prediction.found_in_whole_image(_SHOWN_SCORE)
    _look_first(prediction)
    steps = (prediction.pixels, prediction.steps, prediction.policy, before, prediction.detections)
    _write("recursion.png", recursion_figure(*steps, prediction.categories))
    named = ("whole", "grid-2", "first-pass", "scalenet")
    _policies([predict(prediction.pixels, policy=name) for name in named])
    print(
        json.dumps(
            {"scene": scene, "found before": len(before), "found after": len(prediction.detections), "new": gain}
        )
    )


if __name__ == "__main__":
    main()
