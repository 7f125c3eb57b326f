"""Builders of torchvision's detectors, and of the paper's ResNet-101 detectors from torchvision's parts."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from posixpath import basename

import torchvision
from torch import nn
from torchvision.models import ResNet, resnet101
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from scalenet_ray.core.errors import UserError

_ZERO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
"""Detectors whose published weights were trained with an epsilon of 0 in the frozen batch norms."""


def build_detector(name: str, num_classes: int) -> nn.Module:
    """Build torchvision's model in training mode, with random weights and torchvision's resizing.

    Args:
        name: one of `detector_names()`.
        num_classes: number of classes, including the background as class 0.

    Raises:
        UserError: if the name is unknown.
    """
    _check_name(name)
    if name in _OF_THE_PAPER:
        return _OF_THE_PAPER[name](num_classes)
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)


def fetch_detector(name: str) -> nn.Module:
    """Build a detector with torchvision's default weights, trained on COCO, from torch's cache or the network.

    Raises:
        ConnectionError: if the weights are not in the cache and can't be downloaded.
        UserError: if the name is unknown, or torchvision has no weights for it.
    """
    _check_name(name)
    if name in _OF_THE_PAPER:
        msg = f"torchvision has no weights for {name}: give a file, as torchvision:{name}@PATH"
        raise UserError(msg)
    try:
        return torchvision.models.get_model(name, weights="DEFAULT", progress=False)
    except OSError as error:
        msg = f"can't fetch torchvision's weights for {name} ({error}): without a network, use torchvision:{name}@PATH"
        raise ConnectionError(msg) from error


def detector_names() -> list[str]:
    """Names of the supported detectors, sorted."""
    detection = torchvision.models.detection
    return sorted([*torchvision.models.list_models(detection, exclude="keypointrcnn*"), *_OF_THE_PAPER])


def published_name(path: str) -> str | None:
    """The detector whose weights torchvision publishes under this file name, or None."""
    for name in detector_names():
        if name not in _OF_THE_PAPER:
            weights = torchvision.models.get_model_weights(name)
            if basename(path) in [basename(member.url) for member in weights]:
                return name
    return None


def norm_eps(model: nn.Module) -> dict[str, float]:
    """Epsilon of each batch norm by name, which a state dict does not hold."""
    norms = (nn.BatchNorm2d, FrozenBatchNorm2d)
    return {name: module.eps for name, module in model.named_modules() if isinstance(module, norms)}


def set_norm_eps(model: nn.Module, path: str, saved: dict[str, float]) -> None:
    """Set the epsilon of the batch norms to the one that the weights were trained with.

    Args:
        model: the model; changed in place.
        path: file of its weights; torchvision's files are recognized by their name.
        saved: epsilon by name, see `norm_eps`; {} if the file does not have it.
    """
    if not saved and published_name(path) in _ZERO_EPS:
        saved = dict.fromkeys(norm_eps(model), 0.0)
    for name, eps in saved.items():
        model.get_submodule(name).eps = eps  # type: ignore[assignment]


def _check_name(name: str) -> None:
    if name not in detector_names():
        msg = f"a torchvision detector must be one of {', '.join(detector_names())}, got {name!r}"
        raise UserError(msg)


def _on_resnet101_fpn(network: type[FasterRCNN], num_classes: int) -> FasterRCNN:
    return network(resnet_fpn_backbone(backbone_name="resnet101", weights=None), num_classes)


def _fasterrcnn_resnet101(num_classes: int) -> FasterRCNN:
    """Stages 1 to 4 run on the image (stride 16), stage 5 on each region (He et al., 2016, appendix A)."""
    resnet: ResNet = resnet101(weights=None, norm_layer=FrozenBatchNorm2d)
    shared = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone = nn.Sequential(OrderedDict((part, resnet.get_submodule(part)) for part in shared))
    backbone.out_channels = 1024  # type: ignore[assignment]
    per_region: OrderedDict[str, nn.Module] = OrderedDict(
        layer4=resnet.layer4, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()
    )
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=nn.Sequential(per_region),
        box_predictor=FastRCNNPredictor(2048, num_classes),
        # As in the original: stage 5 on torchvision's 1,000 regions would dominate the cost.
        rpn_post_nms_top_n_test=300,
    )


_OF_THE_PAPER = {
    "fasterrcnn_resnet101": _fasterrcnn_resnet101,
    "fasterrcnn_resnet101_fpn": partial(_on_resnet101_fpn, FasterRCNN),
    "maskrcnn_resnet101_fpn": partial(_on_resnet101_fpn, MaskRCNN),
}
