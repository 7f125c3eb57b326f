"""Extensions outside the package: the examples of docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from scalenet_ray import get_scaled_prediction
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.models.detectors import load_detector
from tests.job_scripts import REPOSITORY


def write_example(module: str, starts: str, ends: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a part of the page's code as a module outside of the package."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    example = re.search(rf"^{starts}.*?(?=^{ends})", page, re.MULTILINE | re.DOTALL)
    assert example is not None
    (folder / f"{module}.py").write_text(example[0])
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def bright_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckedDetector:
    """The page's detector, loaded by its name from a module that is not in the package."""
    write_example("bright_blobs", "import cv2\n", "image = ", tmp_path, monkeypatch)
    name = "bright_blobs:BrightBlobs"
    return CheckedDetector(load_detector(name), name)


def test_a_detector_outside_the_package_is_loaded_by_its_name(bright_blobs: CheckedDetector) -> None:
    assert bright_blobs.input_side == 256
    assert dict(bright_blobs.categories) == {0: "blob"}


def test_slices_find_what_a_detector_outside_the_package_misses_in_the_whole_image(
    bright_blobs: CheckedDetector,
) -> None:
    image = np.zeros((1024, 1024, 3), np.uint8)
    image[100:120, 200:220] = 255
    found = {
        policy: get_scaled_prediction(image, bright_blobs, policy=policy, verbose=0).detections
        for policy in ("whole", "grid-3")
    }
    assert len(found["whole"]) == 0
    np.testing.assert_allclose(found["grid-3"].boxes, [[200, 100, 220, 120]], atol=4)


def test_a_policy_outside_the_package_cuts_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bright_blobs: CheckedDetector
) -> None:
    write_example("halves", "def left_and_right", "policy = ", tmp_path, monkeypatch)
    image = np.zeros((512, 1024, 3), np.uint8)
    image[100:124, 200:224] = 255  # 6 pixels in the whole image's tile, 11 in a half's
    found = get_scaled_prediction(image, bright_blobs, policy="halves:left_and_right", verbose=0)
    assert [step.tile.window.xyxy for step in found.steps] == [(0, 0, 1024, 512), (0, 0, 544, 512), (480, 0, 1024, 512)]
    np.testing.assert_allclose(found.detections.boxes, [[200, 100, 224, 124]], atol=3)
