"""Draw the documentation's pictures into docs/images, with the embedded sample's networks.

Run it with `.venv/bin/python docs/draw_pictures.py`. `beach.jpg` shows a photograph-like scene (`beach_scene.py`), the
other pictures show a scene of the embedded sample.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from beach_scene import BeachScene, render_beach
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
from scalenet_ray.sample.scenes import sample_scene

_SHOWN_SCORE = 0.4
_SCENES = 12
_BEACH_SEED = 1
_BEACH_SCENES = 6
_BEACH_SCORE = 0.5
_BEACH_INPUT_SIDE = 384
_BEACH_CROP = (480, 348, 810, 568)
_IMAGES = Path(__file__).parent / "images"


def _write(name: str, figure: Figure) -> None:
    """Write a figure as a PNG of 256 colours, a third of the bytes."""
    picture = Image.open(io.BytesIO(picture_bytes(figure, "png"))).convert("RGB")
    picture.quantize(256).save(_IMAGES / name, optimize=True)


def _correct(scene: BeachScene, found: Detections) -> np.ndarray:
    """[N] bool: the boxes that match a kite of their class at an IoU of 0.5."""
    matches = (iou_matrix(scene.boxes, found.boxes) >= 0.5) & (scene.labels[:, None] == found.labels[None])
    return matches.any(axis=0)


def _draw_kites(axes: Axes, scene: BeachScene, found: Detections, before: Detections, line_width: float) -> None:
    """Draw boxes: white if the whole image alone gives them, orange if new, red if wrong."""
    new, correct = are_new(found, before), _correct(scene, found)
    colours = [
        "#ff1f3d" if not right else "#ffb000" if fresh else "white" for fresh, right in zip(new, correct, strict=True)
    ]
    draw_boxes(axes, scene.pixels, found, colours, line_width=line_width)
    for patch in axes.patches:
        patch.set_path_effects([withStroke(linewidth=line_width + 1.4, foreground="#101418")])


def _find_kites(detector: Detector, scene: BeachScene, policy_name: str) -> ScaledPrediction:
    policy = parse_policy(policy_name, input_side=_BEACH_INPUT_SIDE, iou_threshold=detector.iou_threshold)
    return get_scaled_prediction(scene.pixels, detector, policy=policy, confidence_threshold=_BEACH_SCORE, verbose=0)


def _count_kites(detector: Detector, seed: int, policy_name: str) -> dict[str, Any]:
    """Correct and wrong boxes of a policy in the scene of a seed, and its passes over the whole image's."""
    scene = render_beach(seed)
    prediction = _find_kites(detector, scene, policy_name)
    correct = int(_correct(scene, prediction.detections).sum())
    pixels = [step.result.detector_pixels for step in prediction.steps]
    return {
        "seed": seed,
        "policy": policy_name,
        "kites": len(scene.labels),
        "correct": correct,
        "wrong": len(prediction.detections) - correct,
        "passes": sum(pixels) / pixels[0],
    }


def _beach(detector: Detector) -> None:
    """Draw the whole image's detections beside those after zooming, with an enlarged part of each below."""
    scene = render_beach(_BEACH_SEED)
    prediction = _find_kites(detector, scene, "first-pass")
    before, after = prediction.found_in_whole_image(_BEACH_SCORE), prediction.detections
    windows = [child.window for step in prediction.steps for child in step.children]
    x0, y0, x1, y1 = _BEACH_CROP
    width = 6.4
    heights = (width * scene.pixels.shape[0] / scene.pixels.shape[1], width * (y1 - y0) / (x1 - x0))
    total = len(scene.labels)
    correct = [int(_correct(scene, found).sum()) for found in (before, after)]
    wrong = [len(found) - right for found, right in zip((before, after), correct, strict=True)]
    titles = (
        f"The whole image: {correct[0]} of {total} kites, {wrong[0]} wrong boxes",
        f"After zooming into {len(windows)} windows: {correct[1]} of {total}, {wrong[1]} wrong",
    )
    with drawing(2 * width, sum(heights) + 0.35) as figure:
        panels = figure.subplots(2, 2, height_ratios=heights)
        for column, (found, title) in enumerate(zip((before, after), titles, strict=True)):
            top, low = panels[:, column]
            _draw_kites(top, scene, found, before, 1.6)
            top.set_title(title, fontsize=15)
            _draw_kites(low, scene, found, before, 2.4)
            low.set_xlim(x0, x1)
            low.set_ylim(y1, y0)
            frame = {"fill": False, "edgecolor": "white", "linewidth": 1.2, "linestyle": (0, (4, 3))}
            top.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **frame))
        picture = Image.open(io.BytesIO(picture_bytes(figure, "png", 125.0))).convert("RGB")
        picture.save(_IMAGES / "beach.jpg", quality=88, optimize=True)


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
    """Draw the beach, and the scene among the val split's first in which the recursion finds most new objects."""
    detector = load_detector(SAMPLE_DETECTOR)
    _beach(detector)
    for seed in range(_BEACH_SCENES):
        for name in ("whole", "first-pass", "grid-2", "grid-3"):
            print(json.dumps(_count_kites(detector, seed, name)))
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
