"""Recursive detection on one image, with the arguments and result of SAHI's `get_sliced_prediction`."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from PIL import Image

from scalenet_ray.api.inputs import check_threshold, checked_pixels
from scalenet_ray.api.prediction import Prediction
from scalenet_ray.console import say
from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.geometry import AnyImage
from scalenet_ray.core.merge import SuppressionMethod, merge_detections, nms
from scalenet_ray.core.networks import AnyScalePredictor
from scalenet_ray.core.policy import Policy, parse_policy
from scalenet_ray.core.policy_form import check_smallest_object
from scalenet_ray.core.recursion import Step, recursive_detect
from scalenet_ray.data import storage
from scalenet_ray.data.images import decode_image, to_rgb
from scalenet_ray.data.rasters import open_raster
from scalenet_ray.models.checked_detector import CheckedDetector
from scalenet_ray.models.detectors import Detector, load_detector, takes_tiles
from scalenet_ray.models.devices import batch_size_on
from scalenet_ray.models.spec import SAMPLE_DETECTOR, SAMPLE_SCALE_NET, NetworkSpec
from scalenet_ray.report.text import step_table

T = TypeVar("T")

_SUPPRESSION: dict[str, SuppressionMethod] = {
    "CONSENSUS": "consensus",
    "NMS": "nms",
    "SOFT-NMS-LINEAR": "soft-nms-linear",
    "SOFT-NMS-GAUSSIAN": "soft-nms-gaussian",
}


def get_scaled_prediction(
    image: str | os.PathLike[str] | np.ndarray | Image.Image,
    detection_model: str | Detector | None = None,
    *,
    policy: str | Policy | None = None,
    smallest_object: float | None = None,
    slice_height: int | None = None,
    slice_width: int | None = None,
    overlap_height_ratio: float | None = None,
    overlap_width_ratio: float | None = None,
    scale_net: str | AnyScalePredictor | None = None,
    confidence_threshold: float = 0.3,
    device: str = "cpu",
    batch_size: int | None = None,
    perform_standard_pred: bool = True,
    postprocess_type: str | None = None,
    postprocess_match_metric: str = "IOU",
    postprocess_match_threshold: float | None = None,
    postprocess_class_agnostic: bool = False,
    exclude_classes_by_name: Collection[str] = (),
    exclude_classes_by_id: Collection[int] = (),
    verbose: int = 1,
) -> ScaledPrediction:
    """Detect objects in one image with recursive zooming, in this process.

    Arguments have the names that SAHI's `get_sliced_prediction` gives them where they mean the same.

    Args:
        image: a local path or a store's address, [h, w, 3] uint8 RGB, or a Pillow image. A large TIFF is read by
            window, see `data.rasters`.
        detection_model: a detector's name (`kind:what`, see `load_detector`) or a detector; None for the embedded
            sample's. A name is loaded on every call: for many images load it once.
        policy: a policy or its name; None for `scalenet` if there is a Scale Net, else for `regions`.
        smallest_object: side of the smallest object worth finding, in image pixels, for `regions`; None for 16.
        slice_height: side of the slices of policy `slices@PIXELS`, in image pixels, in place of `policy`.
        slice_width: the same: slices are squares.
        overlap_height_ratio: overlap of neighbouring slices, as a share of their side; None for 0.2.
        overlap_width_ratio: the same.
        scale_net: weights of Scale Net, or a predictor; None for none, or for the embedded sample's with its detector.
        confidence_threshold: objects that score less are left out of the result. The detector itself runs with a
            threshold of 0.01: policy `regions` zooms in where it is unsure.
        device: torch device of networks given by name.
        batch_size: tiles of a call of the networks, at most; None for 1, or 16 if `device` is a GPU.
        perform_standard_pred: must be True: the whole image is always detected.
        postprocess_type: CONSENSUS, NMS, SOFT-NMS-LINEAR or SOFT-NMS-GAUSSIAN; None for the policy's own.
        postprocess_match_metric: must be IOU.
        postprocess_match_threshold: overlap above which a box is suppressed; None for the detector's own.
        postprocess_class_agnostic: after suppression within each class, suppress across classes.
        exclude_classes_by_name: categories to leave out of the result.
        exclude_classes_by_id: the same by id.
        verbose: 0 prints nothing, 1 a line, 2 each step.

    Returns:
        The objects and the steps, with conversions to COCO, supervision and a picture.

    Raises:
        FileNotFoundError: if the image or a network is not there.
        UserError: if a value is out of its range, the image cannot be decoded, or a network fails on it.
    """
    _refuse(perform_standard_pred, postprocess_type, postprocess_match_metric, batch_size)
    check_threshold(confidence_threshold)
    pixels = _pixels(image)
    detector, predict_scale = _networks(detection_model, scale_net, device)
    excluded = _excluded(detector, exclude_classes_by_name, exclude_classes_by_id)
    if slice_height is not None or slice_width is not None:
        policy = _slices(policy, slice_height, slice_width)
    asked = _policy(policy, detector, predict_scale, postprocess_type, postprocess_match_threshold, smallest_object)
    asked = _with_overlap(asked, overlap_height_ratio, overlap_width_ratio)
    steps: list[Step] = []
    begun = time.monotonic()
    result = recursive_detect(
        pixels,
        0,
        asked,
        detect=detector,
        predict_scale=predict_scale,
        observe=steps.append,
        batch_size=batch_size_on(device) if batch_size is None else batch_size,
    )
    seconds = time.monotonic() - begun
    if result.failure is not None:
        msg = f"the image could not be worked on ({result.failure.stage}): {result.failure.reason}"
        raise UserError(msg)
    found = result.detections
    if postprocess_class_agnostic:
        found = found[nms(found.boxes, found.scores, np.zeros(len(found)), asked.merging.iou_threshold)]
    found = found[(found.scores >= confidence_threshold) & ~np.isin(found.labels, excluded)]
    if verbose > 1:
        say(step_table(steps, asked))
    if verbose:
        say(f"{asked.name}: {len(found)} objects, {len(steps)} tiles, {result.detector_passes:.2f} detector passes")
    known, took = dict(detector.categories), {"prediction": seconds}
    return ScaledPrediction(pixels, found, known, asked, tuple(steps), result.detector_passes, took)


def _refuse(standard: bool, postprocess_type: str | None, metric: str, batch_size: int | None) -> None:
    if not standard:
        msg = "perform_standard_pred must be True: the whole image is always detected too, it finds the large objects"
        raise UserError(msg)
    if postprocess_type is not None and postprocess_type.upper() not in _SUPPRESSION:
        msg = (
            f"postprocess_type must be {', '.join(_SUPPRESSION)}, got {postprocess_type!r}: fragments at a window's "
            "edge, which merging is for, are dropped there"
        )
        raise UserError(msg)
    if batch_size is not None and batch_size < 1:
        msg = f"batch_size must be 1 or more, got {batch_size}"
        raise UserError(msg)
    if metric.upper() != "IOU":
        msg = f"postprocess_match_metric must be IOU, got {metric!r}: fragments, which IOS is for, are dropped before"
        raise UserError(msg)


def _pixels(image: str | os.PathLike[str] | np.ndarray | Image.Image) -> AnyImage:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        return checked_pixels(image)
    if not isinstance(image, str | os.PathLike):
        msg = (
            f"image must be an address, [h, w, 3] uint8 RGB or a Pillow image, got {type(image).__name__}: convert it, "
            "or give many images to detect"
        )
        raise UserError(msg)
    raster = open_raster(image)
    return decode_image(storage.read_bytes(image)) if raster is None else raster


def _networks(
    detection_model: str | Detector | None, scale_net: str | AnyScalePredictor | None, device: str
) -> tuple[CheckedDetector, AnyScalePredictor | None]:
    if detection_model is None:
        detection_model = SAMPLE_DETECTOR
        scale_net = scale_net or SAMPLE_SCALE_NET
    if isinstance(detection_model, str):
        detector = CheckedDetector(load_detector(detection_model, device=device), detection_model)
    else:
        detector = CheckedDetector(detection_model, type(detection_model).__name__)
    if isinstance(scale_net, str):
        scale_net = NetworkSpec(scale_net=scale_net, device=device).load_scale_net()
    return detector, scale_net


def _policy(
    policy: str | Policy | None,
    detector: CheckedDetector,
    predict_scale: AnyScalePredictor | None,
    postprocess_type: str | None,
    iou_threshold: float | None,
    smallest_object: float | None,
) -> Policy:
    if policy is None:
        policy = "regions" if predict_scale is None else "scalenet"
    if isinstance(policy, Policy):
        if not (postprocess_type is None and iou_threshold is None):
            msg = "postprocess_type and postprocess_match_threshold are for policies by name: set policy.merging"
            raise UserError(msg)
        return ready_policy(policy, smallest_object)
    named = parse_policy(
        policy,
        input_side=detector.input_side,
        iou_threshold=detector.iou_threshold if iou_threshold is None else iou_threshold,
        smallest_object=smallest_object,
        takes_larger=takes_tiles(detector, 2 * detector.input_side, detector.name),
    )
    check_smallest_object(smallest_object, [named])
    if named.reads_truth:
        msg = f"policy {named.name} reads the ground truth, which one image has not: give another one"
        raise UserError(msg)
    if postprocess_type is None:
        return named
    return replace(named, merging=replace(named.merging, method=_SUPPRESSION[postprocess_type.upper()]))


def ready_policy(policy: Policy, smallest_object: float | None) -> Policy:
    """The policy itself; raises `UserError` if a smallest object, which is for policies by name, is given too."""
    if smallest_object is not None:
        msg = f"smallest_object is for policies by name, got policy {policy.name}: set its regions.smallest_object"
        raise UserError(msg)
    return policy


def _slices(policy: str | Policy | None, height: int | None, width: int | None) -> str:
    """Name of the policy that cuts slices of a size."""
    if policy is not None:
        msg = f"slice_height and slice_width stand for policy slices@PIXELS, got policy {policy!r} too: leave one out"
        raise UserError(msg)
    return f"slices@{_equal('slices', height, width)}"


def _with_overlap(policy: Policy, height: float | None, width: float | None) -> Policy:
    """A policy of slices with their overlap."""
    if height is None and width is None:
        return policy
    if policy.kind != "slices":
        msg = f"overlap ratios are of slices, got them with policy {policy.name}: give slice_height, or leave them out"
        raise UserError(msg)
    return replace(policy, overlap=_equal("overlap ratios", height, width))


def _equal(name: str, height: T | None, width: T | None) -> T:
    """The value of both sides, of which one may be left out."""
    given = [side for side in (height, width) if side is not None]
    if given[0] != given[-1]:
        msg = f"{name} must have equal height and width: slices are squares, got {height} and {width}"
        raise UserError(msg)
    return given[0]


def _excluded(detector: Detector, names: Collection[str], ids: Collection[int]) -> list[int]:
    """The class ids of excluded categories; raises `UserError` for a name that is none of the detector's."""
    names = [names] if isinstance(names, str) else names
    known = set(detector.categories.values())
    lost = [name for name in names if name not in known]
    if lost:
        msg = f"exclude_classes_by_name must be among the detector's {len(known)} categories, got {', '.join(lost)}"
        raise UserError(msg)
    return [label for label, name in detector.categories.items() if name in names or label in ids]


@dataclass(frozen=True, eq=False, repr=False)
class ScaledPrediction(Prediction):
    """Result of `get_scaled_prediction`: objects, and the steps that led to them.

    Attributes:
        pixels: [h, w, 3] uint8 RGB, the decoded image (upright, 8 bits); of a large TIFF its windows, read on demand.
        detections: merged, in image pixels, the best first.
        categories: category id -> name.
        policy: the policy.
        steps: the step of each tile, in order.
        detector_passes: cost, in passes over the whole image.
        durations_in_seconds: "prediction": seconds without the loading of networks.
    """

    pixels: AnyImage
    detections: Detections
    categories: Mapping[int, str]
    policy: Policy
    steps: tuple[Step, ...]
    detector_passes: float
    durations_in_seconds: Mapping[str, float] = field(default_factory=dict)

    def found_in_whole_image(self, confidence_threshold: float) -> Detections:
        """Detections of the pass over the whole image alone, without the recursion.

        Args:
            confidence_threshold: detections that score less are left out.
        """
        whole = (0, 0, self.image_width, self.image_height)
        passes = [step for step in self.steps if step.result.detector_pixels and step.tile.window.xyxy == whole]
        found = merge_detections([step.result for step in passes[:1]], self.policy.merging)
        return found[found.scores >= confidence_threshold]
