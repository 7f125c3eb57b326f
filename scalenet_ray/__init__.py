"""Recursive Scale Net on Ray: a learned, recursive zoom for any frozen detector.

What most users need is here by name and loaded when it is first asked for: importing the package loads neither ray nor
torch. Everything else is in the layers: `scalenet_ray.core`, `scalenet_ray.models`, `scalenet_ray.engine`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalenet_ray.core.detections import Detections
    from scalenet_ray.core.errors import TileError, UserError
    from scalenet_ray.core.images import decode_image
    from scalenet_ray.core.interchange import to_supervision
    from scalenet_ray.core.merge import Merging
    from scalenet_ray.core.policy import Policy, Recursion, parse_policy
    from scalenet_ray.core.policy_file import read_policies
    from scalenet_ray.core.recursion import Step, recursive_detect
    from scalenet_ray.core.results import ImageResult
    from scalenet_ray.core.scale import ScaleMap
    from scalenet_ray.core.window import Tile, Window
    from scalenet_ray.export import export_run
    from scalenet_ray.models.detectors import Detector, load_detector
    from scalenet_ray.models.scale_head import load_predictor
    from scalenet_ray.one_image import get_scaled_prediction
    from scalenet_ray.prediction import ScaledPrediction

from scalenet_ray.version import __version__

_HOMES = {
    "Detections": "core.detections",
    "Detector": "models.detectors",
    "ImageResult": "core.results",
    "Merging": "core.merge",
    "Policy": "core.policy",
    "Recursion": "core.policy",
    "ScaleMap": "core.scale",
    "ScaledPrediction": "prediction",
    "Step": "core.recursion",
    "Tile": "core.window",
    "TileError": "core.errors",
    "UserError": "core.errors",
    "Window": "core.window",
    "decode_image": "core.images",
    "export_run": "export",
    "get_scaled_prediction": "one_image",
    "load_detector": "models.detectors",
    "load_predictor": "models.scale_head",
    "parse_policy": "core.policy",
    "read_policies": "core.policy_file",
    "recursive_detect": "core.recursion",
    "to_supervision": "core.interchange",
}
"""Public name -> the module that has it."""

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they are loaded or not."""
    return sorted({*globals(), *__all__})
