"""Detection in Python: one image in this process, or many on an engine."""

from __future__ import annotations

from scalenet_ray.api.many import ImagePrediction, detect
from scalenet_ray.api.prediction import BoundingBox, Category, ObjectPrediction, Prediction, Score
from scalenet_ray.api.scaled_prediction import ScaledPrediction, get_scaled_prediction

__all__ = [
    "BoundingBox",
    "Category",
    "ImagePrediction",
    "ObjectPrediction",
    "Prediction",
    "ScaledPrediction",
    "Score",
    "detect",
    "get_scaled_prediction",
]
