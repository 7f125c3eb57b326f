"""The networks of a job, by name: the driver names them, actors load them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from scalenet_ray.core.bounds import SHARE
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.policy import Evidence, Policy
from scalenet_ray.data.coco import ImageRecord
from scalenet_ray.models.checked_detector import CheckedDetector, MappedDetector
from scalenet_ray.models.detector_check import try_detector
from scalenet_ray.models.detectors import Detector, DetectorInfo, declaration, load_detector

__all__ = [
    "SAMPLE_DETECTOR",
    "SAMPLE_SCALE_NET",
    "DetectorInfo",
    "NetworkSpec",
]

if TYPE_CHECKING:
    from scalenet_ray.models.scale_head import HeadConfig, ScaleHeadPredictor
    from scalenet_ray.models.scale_net import ScaleNetPredictor


_WEIGHTS = Path(__file__).parents[1] / "sample"


SAMPLE_DETECTOR = f"tiny:{_WEIGHTS / 'sample_detector.safetensors'}"
"""The detector of the embedded sample, trained without its small objects."""


SAMPLE_SCALE_NET = str(_WEIGHTS / "sample_scale_net.safetensors")
"""The Scale Net of the embedded sample."""


def _readable(records: Sequence[ImageRecord], open_image: Callable[[ImageRecord], np.ndarray]) -> Iterator[np.ndarray]:
    """The images that can be read, one after the other."""
    for record in records:
        try:
            yield open_image(record)
        except TileError:
            continue


@dataclass(frozen=True)
class NetworkSpec:
    """The networks: the frozen detector, and Scale Net.

    Attributes:
        detector: kind:what, e.g. yolox-onnx:PATH, torchvision:NAME, torchvision:PATH, module:Class. Without
            --data: the embedded sample's.
        scale_net: weights of Scale Net, a local path or s3://. Without --data: the embedded sample's.
        device: where the networks compute, as torch names it.
        mixed_precision: Scale Net and detectors of torch compute in bfloat16 what bears it: faster on GPUs, and on
            CPUs that know it (AMX, AVX-512 BF16); others imitate it, many times slower. Scores differ a little.
        score_threshold: boxes that score less are dropped.
        iou_threshold: of NMS; None: the detector's own.
    """

    detector: str | None = None
    scale_net: str | None = None
    device: str = "cpu"
    mixed_precision: bool = False
    score_threshold: Annotated[float, SHARE] = 0.01
    iou_threshold: Annotated[float, SHARE] | None = None

    def settings(self) -> dict[str, Any]:
        """What results depend on: not the device; the sample's networks by name, wherever the package lies."""
        sample = {SAMPLE_DETECTOR: "sample", SAMPLE_SCALE_NET: "sample"}
        return {name: sample.get(value, value) for name, value in asdict(self).items() if name != "device"}

    def describe_detector(self) -> DetectorInfo:
        """Load the detector, on the CPU, and say what it is.

        Raises:
            UserError: if no detector is named; else what `load_detector` raises.
        """
        return declaration(self._on_cpu()._load(), str(self.detector))

    def describe_features(self) -> HeadConfig:
        """What a scale head on the detector's feature maps must be.

        Raises:
            UserError: if no detector is named, or it shows no feature maps; else what `load_detector` raises.
        """
        from scalenet_ray.models.scale_head import HeadConfig

        detector = CheckedDetector(self._on_cpu()._load(), str(self.detector))
        return HeadConfig(detector.feature_channels, detector.feature_stride, detector=str(self.detector))

    def check_device(self, here: bool) -> None:
        """Refuse a device that nobody has.

        Args:
            here: whether this machine must have it, and not one that takes part later.

        Raises:
            UserError: if torch knows no such device, or this machine must have it and does not.
        """
        if self.device == "cpu":
            return
        # Here and not above: torch must not be loaded where networks are only named.
        from scalenet_ray.models.devices import device_named, device_on_this_machine

        (device_on_this_machine if here else device_named)(self.device)

    def check(
        self,
        policies: Sequence[Policy],
        categories: Mapping[int, str],
        unused: Collection[int] = (),
        images: Sequence[ImageRecord] = (),
        open_image: Callable[[ImageRecord], np.ndarray] | None = None,
    ) -> None:
        """Load what the policies need, on the CPU, try it, and let it go: what is wrong is said before a run begins.

        Args:
            policies: those of the run.
            categories: category id -> name, to which the detector's labels are mapped.
            unused: ids of those that no annotation is of, which the detector need not know.
            images: some of the run's; on the first that can be read the detector is tried.
            open_image: how one is read: its pixels, [h, w, 3] uint8 RGB, or `TileError`.

        Raises:
            UserError: if the detector lacks a category, cannot take a policy's tiles, or does not answer as
                `try_detector` wants, or Scale Net is missing or was trained on another detector's features, or its
                maps are not those that a policy goes by.
        """
        here = self._on_cpu()
        detector = here.load_detector(categories, unused)
        for policy in policies:
            detector.canvas_hw((policy.largest_side, policy.largest_side))
        needed = any(policy.needs_network for policy in policies)
        predictor = self._check_maps(policies, here.load_scale_net() if needed else None)
        if predictor is not None:
            predictor.check(detector)
        if open_image is not None:
            try_detector(detector.checked, _readable(images, open_image))

    def _check_maps(
        self, policies: Sequence[Policy], predictor: ScaleNetPredictor | ScaleHeadPredictor | None
    ) -> ScaleHeadPredictor | None:
        """Refuse policies that cannot go by the maps that they will read; the predictor, if it is a scale head."""
        head, regression = None, False
        if predictor is not None:
            from scalenet_ray.models.scale_head import ScaleHeadPredictor

            if isinstance(predictor, ScaleHeadPredictor):
                head = predictor
            else:
                regression = predictor.config.kind != "classes"
        for policy in policies:
            if policy.needs_network and policy.recursion.method == "gain" and head is None:
                msg = f"a policy that goes by the gain needs a scale head, got {self.scale_net}: train --preset head"
                raise UserError(msg)
            if policy.needs_first_pass and policy.needs_network and regression:
                msg = f"policy {policy.name} fuses class maps, got {self.scale_net} with regression maps: give another"
                raise UserError(msg)
            if (
                policy.uses_evidence
                and policy.recursion.zoom is None
                and not (policy.evidence is Evidence.NETWORK and regression)
            ):
                msg = (
                    f"policy {policy.name} has zoom none, which rescales by 1 / TopK of a regression map, but reads "
                    "class maps: give a fixed zoom"
                )
                raise UserError(msg)
        return head

    def reads_features(self, policies: Sequence[Policy]) -> bool:
        """Whether a policy needs Scale Net, and that reads the detector's feature maps; raises as `load_scale_net`."""
        from scalenet_ray.models.scale_head import ScaleHeadPredictor

        needed = any(policy.needs_network for policy in policies)
        return needed and isinstance(self._on_cpu().load_scale_net(), ScaleHeadPredictor)

    def load_detector(self, categories: Mapping[int, str], unused: Collection[int] = ()) -> MappedDetector:
        """The detector, its labels mapped by name to the ids of `categories`; those `unused` it need not know."""
        return MappedDetector(self._load(), categories, unused, name=self.detector)

    def _on_cpu(self) -> NetworkSpec:
        """The same where there may be no GPU: a cluster's head has none, and workers come only once there is work."""
        return replace(self, device="cpu")

    def _load(self) -> Detector:
        if self.detector is None:
            msg = "a detector must be named: give --detector kind:what, e.g. yolox-onnx:PATH or torchvision:NAME"
            raise UserError(msg)
        return load_detector(
            self.detector,
            device=self.device,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            mixed_precision=self.mixed_precision,
        )

    def load_scale_net(self) -> ScaleNetPredictor | ScaleHeadPredictor:
        """Scale Net, ready for tiles.

        Raises:
            UserError: if no weights are named; else what `load_predictor` raises.
        """
        # Here and not above: torch must not be loaded where networks are only named.
        from scalenet_ray.models.scale_head import load_predictor

        if self.scale_net is None:
            msg = "the policies scalenet and fused need Scale Net's weights: give --scale-net PATH"
            raise UserError(msg)
        return load_predictor(self.scale_net, self.device, mixed_precision=self.mixed_precision)
