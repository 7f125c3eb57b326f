"""The public names of the package, and what importing them loads."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import scalenet_ray
from tests.job_scripts import REPOSITORY

PROMISED = {
    "Detections",
    "Detector",
    "ImageResult",
    "Merging",
    "Policy",
    "Recursion",
    "ScaleMap",
    "ScaledPrediction",
    "Step",
    "Tile",
    "TileError",
    "UserError",
    "Window",
    "__version__",
    "decode_image",
    "export_run",
    "get_scaled_prediction",
    "load_detector",
    "load_predictor",
    "parse_policy",
    "read_policies",
    "recursive_detect",
    "to_supervision",
}
MODULES = [
    path
    for path in sorted((REPOSITORY / "scalenet_ray").rglob("*.py"))
    if path.name not in ("__main__.py", "__init__.py", "version.py")
]


def test_the_public_names_are_those_that_are_promised() -> None:
    assert set(scalenet_ray.__all__) == PROMISED
    assert set(dir(scalenet_ray)) >= PROMISED


def test_every_promised_name_can_be_had_and_says_what_it_is() -> None:
    for name in PROMISED - {"__version__"}:
        assert inspect.getdoc(getattr(scalenet_ray, name)), name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'scalenet_ray' has no attribute 'Detection'"):
        scalenet_ray.Detection  # noqa: B018


def test_asking_for_arrays_loads_neither_ray_nor_torch() -> None:
    script = (
        "import sys, scalenet_ray\n"
        "scalenet_ray.Detections, scalenet_ray.recursive_detect, scalenet_ray.parse_policy\n"
        "scalenet_ray.load_detector\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_module_has_the_names_that_it_calls_public() -> None:
    for path in MODULES:
        module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], module.__name__
