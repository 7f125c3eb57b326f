"""Recursive Scale Net on Ray: a learned, recursive zoom for any frozen detector.

What most users need is here by name and loaded when it is first asked for: importing the package loads neither ray nor
torch. Everything else is in the layers: `scalenet_ray.core`, `scalenet_ray.models`, `scalenet_ray.engine`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalenet_ray.api import ImagePrediction, Prediction, ScaledPrediction, detect, get_scaled_prediction
    from scalenet_ray.core.detections import Detections, ImageResult
    from scalenet_ray.core.errors import TileError, UserError
    from scalenet_ray.core.geometry import Tile, Window
    from scalenet_ray.core.merge import Merging
    from scalenet_ray.core.policy import Policy, Recursion, parse_policy
    from scalenet_ray.core.recursion import Step, recursive_detect
    from scalenet_ray.core.scale import ScaleMap
    from scalenet_ray.data.formats import to_supervision
    from scalenet_ray.data.images import decode_image
    from scalenet_ray.data.policy_files import read_policies
    from scalenet_ray.models.detectors import Detector, load_detector
    from scalenet_ray.models.scale_networks import load_predictor
    from scalenet_ray.models.wrapped_detectors import wrap_sahi, wrap_supervision
    from scalenet_ray.runs.export import export_run

__version__ = "0.2.0"

_HOMES = {
    "Detections": "core.detections",
    "Detector": "models.detectors",
    "ImagePrediction": "api",
    "ImageResult": "core.detections",
    "Merging": "core.merge",
    "Policy": "core.policy",
    "Prediction": "api",
    "Recursion": "core.policy",
    "ScaleMap": "core.scale",
    "ScaledPrediction": "api",
    "Step": "core.recursion",
    "Tile": "core.geometry",
    "TileError": "core.errors",
    "UserError": "core.errors",
    "Window": "core.geometry",
    "decode_image": "data.images",
    "detect": "api",
    "export_run": "runs.export",
    "get_scaled_prediction": "api",
    "load_detector": "models.detectors",
    "load_predictor": "models.scale_networks",
    "parse_policy": "core.policy",
    "read_policies": "data.policy_files",
    "recursive_detect": "core.recursion",
    "to_supervision": "data.formats",
    "wrap_sahi": "models.wrapped_detectors",
    "wrap_supervision": "models.wrapped_detectors",
}
"""Public name -> the module that has it."""

__all__ = [
    "Detections",
    "Detector",
    "ImagePrediction",
    "ImageResult",
    "Merging",
    "Policy",
    "Prediction",
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
    "detect",
    "export_run",
    "get_scaled_prediction",
    "load_detector",
    "load_predictor",
    "parse_policy",
    "read_policies",
    "recursive_detect",
    "to_supervision",
    "wrap_sahi",
    "wrap_supervision",
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
