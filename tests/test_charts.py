"""The chart of policies."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from scalenet_ray.report.charts import policy_plot
from scalenet_ray.report.page import render_report

pytestmark = pytest.mark.usefixtures("drawn_charts")

WHOLE = {"AP_small": 12.5, "detector_passes_per_image": 1.0}
GRID = {"AP_small": 20.0, "detector_passes_per_image": 5.0}
DOCUMENT = {"images": {"total": 3, "done": 3, "failed": 0}, "policies": {"whole": WHOLE, "grid-2": GRID}}
COMPARED = DOCUMENT | {
    "compared_with": "grid-2",
    "differences": {"whole": {"AP_small": {"difference": -7.5, "low": -9.0, "high": -3.0, "above": 0.0}}},
}


def test_each_policy_is_named_with_its_figures() -> None:
    drawn = policy_plot(DOCUMENT)
    texts = {element.text for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {"whole  12.5 at 1.00", "grid-2  20.0 at 5.00", "detector passes per image"} <= texts
    assert not any("paired" in text for text in texts if text)


def test_a_comparison_adds_bars_and_says_with_what() -> None:
    assert "95 % of the paired differences to grid-2" in policy_plot(COMPARED)
    assert re.findall('id="interval (.*)"', policy_plot(COMPARED)) == ["whole"]
    assert "interval" not in policy_plot(DOCUMENT)


def test_the_same_figures_give_the_same_picture() -> None:
    assert policy_plot(COMPARED) == policy_plot(COMPARED)


def test_without_small_objects_there_is_no_picture() -> None:
    unknown = GRID | {"AP_small": float("nan")}
    document = DOCUMENT | {"policies": {"whole": {"detector_passes_per_image": 1.0}, "grid-2": unknown}}
    assert policy_plot(document) == ""
    assert policy_plot(DOCUMENT | {"policies": {"grid-2": GRID | {"detector_passes_per_image": 0.0}}}) == ""
    details = {"shown_score": 0.3, "images": []}
    assert "against detector passes" not in render_report(document, details)
    assert "against detector passes" in render_report(DOCUMENT, details)
