"""Specification of a job's networks, which the driver checks and the actors load."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from scalenet_ray.core.bounds import SHARE
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.geometry import whole_pixels
from scalenet_ray.core.networks import FeatureScalePredictor
from scalenet_ray.core.policy import Policy
from scalenet_ray.data import storage
from scalenet_ray.data.image_records import ImageRecord, OpenImage
from scalenet_ray.models.checked_detector import CheckedDetector, MappedDetector
from scalenet_ray.models.detector_check import try_detector
from scalenet_ray.models.detectors import IN_ONNX, Detector, DetectorInfo, check_kind_on, declaration, load_detector
from scalenet_ray.models.devices import device_named, device_on_this_machine, has_gpu_driver, is_tensorrt
from scalenet_ray.models.onnx_session import providers_of
from scalenet_ray.models.scale_networks import (
    ONNX_SUFFIX,
    HeadConfig,
    ScaleHeadPredictor,
    ScaleNetPredictor,
    load_predictor,
)

AUTO = "auto"
"""Device: a GPU if there is one and the networks run on it, else the CPU."""

_WEIGHTS = Path(__file__).parents[1] / "sample"

SAMPLE_DETECTOR = f"tiny:{_WEIGHTS / 'sample_detector.onnx'}"
"""Detector of the embedded sample, trained without small objects; needs no torch."""

SAMPLE_DETECTOR_WEIGHTS = f"tiny:{_WEIGHTS / 'sample_detector.safetensors'}"
"""The same network in torch."""

SAMPLE_SCALE_NET = str(_WEIGHTS / "sample_scale_net.onnx")
"""Scale Net of the embedded sample; needs no torch."""

SAMPLE_SCALE_NET_WEIGHTS = str(_WEIGHTS / "sample_scale_net.safetensors")
"""The same network in torch."""

_IN_TORCH = {SAMPLE_DETECTOR: SAMPLE_DETECTOR_WEIGHTS, SAMPLE_SCALE_NET: SAMPLE_SCALE_NET_WEIGHTS}

_TRIED_SIDE = 2048
"""Longer side at least of the images that a detector is tried on, if they are read by window."""


def _readable(records: Sequence[ImageRecord], open_image: OpenImage) -> Iterator[np.ndarray]:
    """Pixels of the images that can be read, lazily."""
    for record in records:
        try:
            pixels = whole_pixels(open_image(record), _TRIED_SIDE)
        except TileError:
            continue
        yield pixels


def _digest(uri: str) -> str | None:
    """Start of the SHA-256 of a file; None if there is none that this machine can read."""
    try:
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()[:16] if uri else None
    except (OSError, UserError):
        return None


@dataclass(frozen=True)
class NetworkSpec:
    """The frozen detector and Scale Net.

    Attributes:
        detector: kind:what, e.g. onnx:PATH, ultralytics:PATH, torchvision:NAME, module:Class. Without
            --data: the embedded sample's.
        scale_net: weights of Scale Net, a local path or a store's address. Without --data: the embedded sample's.
        device: torch device of the networks; auto: a GPU if there is one and they run on it, else the CPU; tensorrt: a
            GPU, a detector in ONNX in TensorRT.
        mixed_precision: run Scale Net and torch detectors under bfloat16 autocast: faster on GPUs and on CPUs with AMX
            or AVX-512 BF16, many times slower on other CPUs. Scores change slightly.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS; None for the detector's own.
    """

    detector: str | None = None
    scale_net: str | None = None
    device: str = AUTO
    mixed_precision: bool = False
    score_threshold: Annotated[float, SHARE] = 0.01
    iou_threshold: Annotated[float, SHARE] | None = None

    def settings(self) -> dict[str, Any]:
        """Settings that the results depend on: without the device, and with the sample's networks as "sample".

        "weights" holds the digests of the files of weights, which may be others under the same name when a run is
        resumed; None where this machine has no such file, as of a network that is known by its name.
        """
        sample = dict.fromkeys((*_IN_TORCH, *_IN_TORCH.values()), "sample")
        given = {name: sample.get(value, value) for name, value in asdict(self).items() if name != "device"}
        files = {"detector": str(given["detector"]).partition(":")[2], "scale_net": str(given["scale_net"] or "")}
        return given | {"weights": {name: _digest(file) for name, file in files.items()}}

    def describe_detector(self) -> DetectorInfo:
        """Load the detector on the CPU and return its attributes.

        Raises:
            UserError: if no detector is given; see also `load_detector`.
        """
        return declaration(self._on_cpu()._load(), str(self.detector))

    def describe_features(self) -> HeadConfig:
        """Configuration of a scale head for the detector's feature maps.

        Raises:
            UserError: if no detector is given, or it provides no feature maps; see also `load_detector`.
        """
        detector = CheckedDetector(self._on_cpu()._load(), str(self.detector))
        return HeadConfig(detector.feature_channels, detector.feature_stride, detector=str(self.detector))

    def check_device(self, here: bool) -> None:
        """Check the name of the device, and if `here` that this machine has it, and not only the workers.

        Raises:
            UserError: if the name is not valid in torch, or this machine lacks the device, or the detector does not
                run on it.
        """
        if self.device in ("cpu", AUTO):
            return
        if is_tensorrt(self.device):
            check_kind_on(self.device, str(self.detector))
        elif find_spec("torch") is not None:
            # onnxruntime has a build of its own for GPUs, whatever torch finds.
            (device_on_this_machine if here and not self._in_onnx else device_named)(self.device)
        if here and (is_tensorrt(self.device) or self._in_onnx):
            providers_of(self.device)

    @property
    def _in_onnx(self) -> bool:
        """True if all networks run in onnxruntime on the device."""
        detector, scale_net = (self._runnable(name or "") for name in (self.detector, self.scale_net))
        return detector.partition(":")[0] in IN_ONNX and (not scale_net or scale_net.endswith(ONNX_SUFFIX))

    def check(
        self,
        policies: Sequence[Policy],
        categories: Mapping[int, str],
        unused: Collection[int] = (),
        images: Sequence[ImageRecord] = (),
        open_image: OpenImage | None = None,
    ) -> list[str]:
        """Load and test the networks of the policies on the CPU, before a run starts.

        Args:
            policies: policies of the run.
            categories: category id -> name, to which the detector's labels are mapped.
            unused: ids of categories without an annotation, which the detector may lack.
            images: images to test the detector on, see `try_detector`.
            open_image: opens an image, or raises `TileError`.

        Returns:
            Warnings of `try_detector`, a line each.

        Raises:
            UserError: if the detector lacks a category, does not support a policy's tile size or fails `try_detector`;
                or if Scale Net is missing, does not match the detector's features, or predicts other maps than a
                policy needs.
        """
        here = self._on_cpu()
        loaded = here._load()
        detector = MappedDetector(loaded, categories, unused, name=self.detector)
        for policy in policies:
            detector.canvas_hw((policy.largest_side, policy.largest_side))
        needed = any(policy.needs_network for policy in policies)
        scale_net = here.load_scale_net() if needed else None
        if isinstance(scale_net, FeatureScalePredictor):
            scale_net.check(detector)
        self._check_maps(policies, scale_net)
        if open_image is None:
            return []
        return try_detector(CheckedDetector(loaded, detector.name), _readable(images, open_image))

    def _check_maps(self, policies: Sequence[Policy], scale_net: Any) -> None:
        """Check that the policies support Scale Net's maps."""
        # A scale head, and a predictor of the user's own, declare no kind of map.
        regression = getattr(getattr(scale_net, "config", None), "kind", None) == "regression"
        for policy in policies:
            reads_regression = policy.needs_network and regression
            if policy.regions is not None and reads_regression:
                msg = (
                    f"policy {policy.name} plans regions from class maps, got {self.scale_net} with regression maps: "
                    "give another"
                )
                raise UserError(msg)
            if policy.uses_evidence and policy.recursion.zoom is None and not reads_regression:
                msg = (
                    f"policy {policy.name} has zoom none, which rescales by 1 / TopK of a regression map, but reads "
                    "class maps: give a fixed zoom"
                )
                raise UserError(msg)

    def reads_features(self, policies: Sequence[Policy]) -> bool:
        """True if a policy needs Scale Net and it is a scale head; raises as `load_scale_net` does."""
        needed = any(policy.needs_network for policy in policies)
        return needed and isinstance(self._on_cpu().load_scale_net(), FeatureScalePredictor)

    def load_detector(self, categories: Mapping[int, str], unused: Collection[int] = ()) -> MappedDetector:
        """Load the detector, with labels mapped by name to the ids of `categories`; it may lack the `unused` ones."""
        return MappedDetector(self._load(), categories, unused, name=self.detector)

    def _on_cpu(self) -> NetworkSpec:
        """The specification with device "cpu": the driver may have no GPU."""
        return replace(self, device="cpu")

    def on_this_machine(self) -> NetworkSpec:
        """The specification with the device of this machine in place of auto."""
        if self.device != AUTO:
            return self
        if has_gpu_driver():
            on_gpu = replace(self, device="cuda")
            with suppress(UserError):
                on_gpu.check_device(here=True)
                on_gpu._load()
                return on_gpu
        return self._on_cpu()

    @property
    def _device(self) -> str:
        """The device; the CPU until auto is settled."""
        return "cpu" if self.device == AUTO else self.device

    def _load(self) -> Detector:
        if self.detector is None:
            msg = "a detector must be named: give --detector kind:what, e.g. onnx:PATH or torchvision:NAME"
            raise UserError(msg)
        return load_detector(
            self._runnable(self.detector),
            device=self._device,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            mixed_precision=self.mixed_precision,
        )

    def _runnable(self, network: str) -> str:
        """The sample's networks as safetensors where torch must run them: on a GPU, or under autocast."""
        in_torch = self.mixed_precision or not (self._device == "cpu" or is_tensorrt(self._device))
        return _IN_TORCH.get(network, network) if in_torch else network

    def load_scale_net(self) -> ScaleNetPredictor | ScaleHeadPredictor:
        """Load Scale Net or a scale head.

        Raises:
            UserError: if no weights are given; see also `load_predictor`.
        """
        if self.scale_net is None:
            msg = "the policies scalenet, regions-scalenet and paper need Scale Net's weights: give --scale-net PATH"
            raise UserError(msg)
        return load_predictor(self._runnable(self.scale_net), self._device, mixed_precision=self.mixed_precision)
