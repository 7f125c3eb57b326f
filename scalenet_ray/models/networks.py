"""The networks of a job, by name: the driver names them, actors load them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from scalenet_ray.core.bounds import SHARE
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.policy import Policy
from scalenet_ray.models.detectors import Detector, load_detector
from scalenet_ray.models.mapped_detector import MappedDetector

if TYPE_CHECKING:
    from scalenet_ray.models.scale_head import HeadConfig, ScaleHeadPredictor
    from scalenet_ray.models.scale_net import ScaleNetPredictor

__all__ = ["SAMPLE_DETECTOR", "SAMPLE_SCALE_NET", "DetectorInfo", "NetworkNames"]

_WEIGHTS = Path(__file__).parents[1] / "weights"

SAMPLE_DETECTOR = f"tiny:{_WEIGHTS / 'sample_detector.safetensors'}"
"""The detector of the embedded sample, trained without its small objects."""

SAMPLE_SCALE_NET = str(_WEIGHTS / "sample_scale_net.safetensors")
"""The Scale Net of the embedded sample."""


class DetectorInfo(NamedTuple):
    """What a driver must know of a detector without holding it: its side, its NMS threshold, its classes."""

    input_side: int
    iou_threshold: float
    categories: dict[int, str]


@dataclass(frozen=True)
class NetworkNames:
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

    def describe_detector(self) -> DetectorInfo:
        """Load the detector, on the CPU, and say what it is.

        Raises:
            ValueError: if no detector is named; else what `load_detector` raises.
        """
        detector = self._on_cpu()._load()
        return DetectorInfo(detector.input_side, detector.iou_threshold, dict(detector.categories))

    def describe_features(self) -> HeadConfig:
        """What a scale head on the detector's feature maps must be.

        Raises:
            ValueError: if no detector is named, or it shows no feature maps; else what `load_detector` raises.
        """
        from scalenet_ray.models.scale_head import HeadConfig

        detector = MappedDetector(loaded := self._on_cpu()._load(), loaded.categories)
        return HeadConfig(detector.feature_channels, detector.feature_stride, detector=str(self.detector))

    def check(self, policies: Sequence[Policy], categories: Mapping[int, str], unused: Collection[int] = ()) -> None:
        """Load what the policies need, on the CPU, and let it go: what is wrong is said before a run begins.

        Raises:
            ValueError: if the detector lacks a category or cannot take a policy's tiles, or Scale Net is missing or
                was trained on another detector's features, or says nothing of the gain that a policy goes by.
        """
        here = self._on_cpu()
        detector = here.load_detector(categories, unused)
        for policy in policies:
            detector.canvas_hw((policy.largest_side, policy.largest_side))
        if any(policy.needs_network for policy in policies):
            from scalenet_ray.models.scale_head import ScaleHeadPredictor

            predictor = here.load_scale_net()
            if isinstance(predictor, ScaleHeadPredictor):
                predictor.check(detector)
            elif any(policy.recursion.method == "gain" for policy in policies):
                msg = f"a policy that goes by the gain needs a scale head, got {self.scale_net}: train --preset head"
                raise UserError(msg)

    def reads_features(self, policies: Sequence[Policy]) -> bool:
        """Whether a policy needs Scale Net, and that reads the detector's feature maps; raises as `load_scale_net`."""
        from scalenet_ray.models.scale_head import ScaleHeadPredictor

        needed = any(policy.needs_network for policy in policies)
        return needed and isinstance(self._on_cpu().load_scale_net(), ScaleHeadPredictor)

    def load_detector(self, categories: Mapping[int, str], unused: Collection[int] = ()) -> MappedDetector:
        """The detector, its labels mapped by name to the ids of `categories`; those `unused` it need not know."""
        return MappedDetector(self._load(), categories, unused)

    def _on_cpu(self) -> NetworkNames:
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
            ValueError: if no weights are named; else what `load_predictor` raises.
        """
        # Here and not above: torch must not be loaded where networks are only named.
        from scalenet_ray.models.scale_head import load_predictor

        if self.scale_net is None:
            msg = "the policies scalenet and fused need Scale Net's weights: give --scale-net PATH"
            raise UserError(msg)
        return load_predictor(self.scale_net, self.device, mixed_precision=self.mixed_precision)
