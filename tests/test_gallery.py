"""Images of the report and of `show`: the regions that planned the windows are bright."""

from __future__ import annotations

import base64
import io
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scalenet_ray.core.detections import TileResult
from scalenet_ray.core.expansion import expand, planning_weights
from scalenet_ray.core.networks import NetworkFactories
from scalenet_ray.core.policy import Policy, Recursion, parse_policy
from scalenet_ray.core.recursion import Step
from scalenet_ray.core.scale import NUM_CLASSES, ScaleMap
from scalenet_ray.data.image_records import ImageRecord
from scalenet_ray.report.charts import drawing
from scalenet_ray.report.gallery import PictureTask
from scalenet_ray.report.recursion_figure import draw_look
from tests.faults import Given
from tests.oracles import PerfectDetector

CELLS = 8
SMALL, IN_RANGE = (slice(0, 2), slice(0, 2)), (slice(5, 8), slice(5, 8))
"""Where the object that is zoomed lies, and the one that is in range."""


def class_map(gain_in_range: float | None) -> ScaleMap:
    """Class 1 at `SMALL` and class 2 at `IN_RANGE`; with a gain of 1 at the small one, unless that is None."""
    grid = np.zeros((CELLS, CELLS), int)
    grid[SMALL], grid[IN_RANGE] = 1, 2
    gain = None
    if gain_in_range is not None:
        gain = np.zeros((CELLS, CELLS))
        gain[SMALL], gain[IN_RANGE] = 1.0, gain_in_range
    return ScaleMap(prob=np.arange(NUM_CLASSES)[:, None, None] == grid, gain=gain)


def scale_map() -> ScaleMap:
    scale = np.zeros((CELLS, CELLS), np.float32)
    scale[SMALL], scale[IN_RANGE] = 0.5, 1.0
    return ScaleMap(scale=scale)


KINDS = [
    pytest.param({"method": "class"}, class_map(None), id="class"),
    pytest.param({"method": "class"}, class_map(9.0), id="class-with-gain"),
    pytest.param({"method": "confidence"}, class_map(None), id="confidence"),
    pytest.param({"method": "confidence"}, class_map(9.0), id="confidence-with-gain"),
    pytest.param({}, scale_map(), id="regression"),
]


def policy_with(changes: dict[str, Any]) -> Policy:
    policy = parse_policy("scalenet", input_side=64, iou_threshold=0.65)
    return replace(policy, recursion=Recursion(max_depth=1, **changes))


def step_on(seen: ScaleMap, policy: Policy) -> Step:
    root = policy.root(1, (64, 64))
    return Step(root, seen, expand(root, seen, policy).children, TileResult(1, (), Fraction(1)))


class Sees:
    """A Scale Net that sees one map everywhere."""

    input_pixels = 0

    def __init__(self, seen: ScaleMap) -> None:
        self._seen = seen

    def __call__(self, pixels: Any, tiles: Any) -> list[ScaleMap]:
        return [self._seen] * len(tiles)


@pytest.mark.parametrize(("changes", "seen"), KINDS)
def test_what_is_zoomed_weighs_and_what_is_in_range_does_not(changes: dict[str, Any], seen: ScaleMap) -> None:
    policy = policy_with(changes)
    step = step_on(seen, policy)
    weights = planning_weights(step.tile, seen, policy)
    assert weights[SMALL].min() == weights.max() == 1.0
    assert weights[IN_RANGE].max() == 0.0
    assert step.children[0].window.xyxy == (0, 0, 32, 32)


def test_where_nothing_is_out_of_range_nothing_weighs() -> None:
    policy = policy_with({"method": "confidence"})
    seen = ScaleMap(prob=np.arange(NUM_CLASSES)[:, None, None] == np.full((4, 4), 2), gain=np.ones((4, 4)))
    assert planning_weights(policy.root(1, (64, 64)), seen, policy).tolist() == np.zeros((4, 4)).tolist()


@pytest.mark.parametrize(("changes", "seen"), KINDS)
def test_the_pages_overlay_is_opaque_where_it_was_zoomed_alone(
    changes: dict[str, Any], seen: ScaleMap, tmp_path: Path
) -> None:
    policy = policy_with(changes)
    networks = NetworkFactories(Given(PerfectDetector()), Given(Sees(seen)))
    task = PictureTask(str(tmp_path), [(policy, networks)], lambda record: np.zeros((64, 64, 3), np.uint8))
    (picture,) = task([(ImageRecord(1, "1.png", 64, 64), "random")])
    drawn = base64.b64decode(picture["looks"]["scalenet"]["map"].partition(",")[2])
    alpha = np.asarray(Image.open(io.BytesIO(drawn)))[..., 3]
    assert alpha[SMALL].min() == 255
    assert alpha[IN_RANGE].max() == 0


@pytest.mark.parametrize(("changes", "seen"), KINDS)
def test_shows_picture_is_bright_where_it_was_zoomed_alone(changes: dict[str, Any], seen: ScaleMap) -> None:
    policy = policy_with(changes)
    with drawing(2, 2) as figure:
        axes = figure.subplots()
        draw_look(axes, np.full((64, 64, 3), 40, np.uint8), [step_on(seen, policy)], policy)
        shown = np.asarray(axes.images[0].get_array())
    # Well inside both objects: at their borders the map is smoothed.
    assert shown[4, 4, 0] > 200
    assert shown[60, 60].max() < 40


def test_a_page_of_large_photographs_does_not_hold_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = [
        (replace(policy_with({}), name=name), NetworkFactories(Given(PerfectDetector()), Given(Sees(scale_map()))))
        for name in ("one", "two")
    ]
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def opened(record: ImageRecord) -> np.ndarray:
        nonlocal most
        alive.append(weakref.ref(image := np.full((64, 64, 3), record.image_id, np.uint8)))
        most = max(most, sum(each() is not None for each in alive))
        return image

    task = PictureTask(str(tmp_path), policies, opened)
    chosen = [(ImageRecord(i, f"{i}.png", 64, 64), "random") for i in range(6)]
    held = task(chosen)
    assert (len(alive), most) == (6, 6)
    monkeypatch.setattr("scalenet_ray.report.gallery._HELD_BYTES", 2 * 64 * 64 * 3)
    alive, most = [], 0
    assert task(chosen) == held
    # Two are held; one is being opened while those before it are still named.
    assert (len(alive), most) == (6 + 2 * 4, 5)
