"""Draws the pictures of the documentation from the embedded sample, into docs/images.

Made again by `.venv/bin/python docs/draw_pictures.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from scalenet_ray.api import ScaledPrediction, get_scaled_prediction
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.recursion import Step
from scalenet_ray.evaluation.compare import are_new
from scalenet_ray.models.detectors import load_detector
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.charts import drawing
from scalenet_ray.report.recursion_figure import NEW, SEEN, draw_boxes, draw_look, picture_bytes, recursion_figure
from scalenet_ray.sample.scenes import sample_scene

_SHOWN_SCORE = 0.4
_SCENES = 12
_IMAGES = Path(__file__).parent / "images"


def _write(name: str, figure: Figure) -> None:
    """256 colours are enough, and a third of the bytes."""
    picture = Image.open(io.BytesIO(picture_bytes(figure, "png"))).convert("RGB")
    picture.quantize(256).save(_IMAGES / name, optimize=True)


def _coloured(before: Detections, after: Detections) -> list[str]:
    return [NEW if one else SEEN for one in are_new(after, before).tolist()]


def _look_first(prediction: ScaledPrediction) -> None:
    """What is found in the whole image, where is looked, what is found then."""
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
    """The windows that policies ask for in one scene, and their price."""
    image = shown[0].pixels
    side = 3.4
    with drawing(side * len(shown), side * image.shape[0] / image.shape[1] + 0.4) as figure:
        for axes, prediction in zip(figure.subplots(1, len(shown)), shown, strict=True):
            asking: list[Step] = [step for step in prediction.steps if step.children]
            draw_look(axes, image, asking, prediction.policy)
            axes.set_title(f"{prediction.policy.name}: {prediction.detector_passes:.0f} passes")
        _write("policies.png", figure)


def main() -> None:
    """Draw, of the first scenes of the val split, the one in which the recursion finds most that was missed."""
    detector = load_detector(SAMPLE_DETECTOR)
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
