"""Adapter of torchvision's detectors, without their resizing, which would undo the zoom."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError
from scalenet_ray.core.masks import encode_mask
from scalenet_ray.models.class_names import COCO_CATEGORIES, COCO_NUM_CLASSES
from scalenet_ray.models.padding import square_canvas, stride_canvas
from scalenet_ray.models.torch_detector import ReadTile, TorchDetector, TorchSettings, finite_rows, in_float32
from scalenet_ray.models.torchvision_builders import (
    build_detector,
    fetch_detector,
    norm_eps,
    published_name,
    set_norm_eps,
)
from scalenet_ray.models.weights import SUFFIXES, load_weights, save_weights

HW = tuple[int, int]


class TorchvisionDetector(TorchDetector):
    """`Detector` with a torchvision network; Mask R-CNN also returns masks.

    Its input side is the size that torchvision would resize to. `name` is that of torchvision's builder, if known.
    """

    name = ""

    def __init__(self, model: nn.Module, categories: Mapping[int, str], **settings: Unpack[TorchSettings]) -> None:
        """Prepare a model for inference on tiles.

        Args:
            model: Faster R-CNN, Mask R-CNN, RetinaNet, FCOS or SSD; changed in place (evaluation mode, device, channels
                last, thresholds, no resizing).
            categories: class id -> name; detections of other classes are dropped.
            settings: device, thresholds and precision.
        """
        last_stage: Any = model.roi_heads if hasattr(model, "roi_heads") else model
        super().__init__(float(last_stage.nms_thresh), **settings)
        last_stage.score_thresh, last_stage.nms_thresh = self.score_threshold, self.iou_threshold
        self.model: Any = model.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.categories = dict(categories)
        resizing = self.model.transform
        self.input_side = int(resizing.min_size[-1])
        self.canvas_hw = partial(stride_canvas, few_to=self.input_side if self._on_gpu else None)
        if resizing.fixed_size:
            # An SSD's coarsest feature maps and default boxes are designed for one square input.
            self.canvas_hw = partial(square_canvas, least=self.input_side)
            self.model.anchor_generator = _FixedSizeBoxes(self.model.anchor_generator, self.input_side)
        self.model.transform = _OnCanvas(resizing, self.canvas_hw)
        self._finite = _FiniteWatch()
        self._hooks = [*_keep_boxes_exact(self.model), *self._finite.hooks_of(self.model)]

    def release(self) -> Any:
        """Remove the hooks for inference and return the network, for training."""
        for hook in self._hooks:
            hook.remove()
        return self.model

    def _forward(self, tiles: list[np.ndarray], canvas: HW) -> list[dict[str, torch.Tensor]]:
        del canvas  # `_OnCanvas` pads to the same size.
        return self.model([self._on_device(tile) for tile in tiles])

    def _reader(
        self, outputs: list[dict[str, torch.Tensor]], tiles: list[np.ndarray], canvas: HW
    ) -> tuple[torch.Tensor, ReadTile]:
        read = _on_cpu(outputs)
        return self._finite.tiles, lambda i: self._read(read[i], tiles[i].shape[:2])

    def _on_device(self, tile: np.ndarray) -> torch.Tensor:
        """[h, w, 3] uint8 -> [3, h, w] float32 in 0..1 on the device; a copy to a GPU is not waited for."""
        # A copy also on a CPU: torch warns about read-only arrays.
        copied = torch.empty(tile.shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        copied.numpy()[:] = tile
        return copied.to(self._device, non_blocking=True).permute(2, 0, 1).float() / 255

    def _read(self, output: dict[str, torch.Tensor], tile_hw: HW) -> Detections | TileError:
        if bad := next((key for key, values in output.items() if not values.isfinite().all()), None):
            return TileError(f"the detector gave {bad} that are NaN or infinite: check its weights and precision")
        masks = _encode_masks(output["masks"], output["boxes"], tile_hw) if "masks" in output else None
        found = Detections(*(output[key].numpy() for key in ("boxes", "scores", "labels")), masks=masks)
        return found[np.isin(found.labels, list(self.categories)) & (found.areas > 0)]


def _on_cpu(outputs: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """A batch's outputs on the CPU, floats as float32: one copy for each key, not for each tile."""
    counts = [len(output["scores"]) for output in outputs]
    parts = {}
    for key in outputs[0]:
        values = torch.cat([output[key] for output in outputs]).cpu()
        parts[key] = (values.float() if values.is_floating_point() else values).split(counts)
    return [{key: parts[key][i] for key in parts} for i in range(len(outputs))]


class _OnCanvas(GeneralizedRCNNTransform):
    """torchvision's transform without resizing: tiles are normalized and padded to their canvas."""

    def __init__(self, resizing: GeneralizedRCNNTransform, canvas_hw: Callable[[HW], HW]) -> None:
        super().__init__(0, 0, resizing.image_mean, resizing.image_std)
        self._canvas_hw = canvas_hw

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        """Return the image and its target unchanged."""
        return image, target

    def batch_images(self, images: list[torch.Tensor], size_divisible: int = 32) -> torch.Tensor:
        """Tiles with equal canvases, [3, h, w] each -> [B, 3, H, W], padded at the right and below."""
        del size_divisible
        height, width = self._canvas_hw((images[0].shape[-2], images[0].shape[-1]))
        batch = images[0].new_zeros((len(images), 3, height, width)).contiguous(memory_format=torch.channels_last)
        for canvas, image in zip(batch, images, strict=True):
            canvas[:, : image.shape[-2], : image.shape[-1]] = image
        return batch

    def postprocess(
        self, result: list[dict], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[dict]:
        """Return the detections unchanged: they are in tile pixels."""
        # Masks are not pasted here: full-size masks of a batch take gigabytes.
        return result


class _FixedSizeBoxes(nn.Module):
    """Default boxes of an SSD in the pixel sizes of its training, which torchvision's generator scales with the canvas.

    `trained_side` is the input side of the training in pixels.
    """

    def __init__(self, generator: nn.Module, trained_side: int) -> None:
        super().__init__()
        self._generator = generator
        self._trained_side = trained_side

    def forward(self, images: ImageList, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Images on canvases, and their feature maps -> [N, 4] xyxy default boxes per image in canvas pixels."""
        shrink = self._trained_side / images.tensors.shape[-1]
        scale = torch.tensor([1, 1, shrink, shrink], device=images.tensors.device)
        all_boxes = (box_convert(boxes, "xyxy", "cxcywh") * scale for boxes in self._generator(images, features))
        return [box_convert(boxes, "cxcywh", "xyxy") for boxes in all_boxes]


def _keep_boxes_exact(model: Any) -> list[RemovableHandle]:
    """Compute anchors and boxes of a network in float32 also under autocast; returns the hooks.

    Both take the type of the features: in bfloat16 a coordinate of 800 pixels is off by up to 2.
    """
    two_stages = hasattr(model, "roi_heads")
    heads = [model.rpn.head, model.roi_heads.box_predictor] if two_stages else [model.head]
    generator = (model.rpn if two_stages else model).anchor_generator
    return [
        *(head.register_forward_hook(lambda _module, _inputs, output: in_float32(output)) for head in heads),
        generator.register_forward_pre_hook(_shapes_alone),
    ]


def _shapes_alone(_module: nn.Module, inputs: tuple[ImageList, list[torch.Tensor]]) -> tuple[Any, ...]:
    """Images and features for a generator of anchors, which reads the shape and the type of the features."""
    images, features = inputs
    wide = [level.new_zeros((), dtype=torch.float32).expand(level.shape) for level in features]
    return images, wide if features[0].dtype == torch.bfloat16 else features


class _FiniteWatch:
    """Forward hooks that record for which tiles of a batch all heads return finite numbers.

    torchvision drops boxes with a score of NaN, so that a failed tile would look empty.

    Attributes:
        tiles: [B] bool, for the last batch.
    """

    def __init__(self) -> None:
        self.tiles = torch.zeros(0, dtype=torch.bool)
        self._proposals: list[int] = []

    def hooks_of(self, model: Any) -> list[RemovableHandle]:
        """Register the hooks with a network."""
        if not hasattr(model, "roi_heads"):
            return [model.head.register_forward_hook(self._see_tiles)]
        return [
            model.rpn.head.register_forward_hook(self._see_tiles),
            model.rpn.register_forward_hook(self._count_proposals),
            model.roi_heads.box_predictor.register_forward_hook(self._see_proposals),
        ]

    def _see_tiles(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.tiles = finite_rows(output)

    def _count_proposals(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._proposals = [len(boxes) for boxes in output[0]]

    def _see_proposals(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        parts = finite_rows(output).split(self._proposals)
        self.tiles = self.tiles & torch.stack([part.all() for part in parts])


def _encode_masks(masks: torch.Tensor, boxes: torch.Tensor, tile_hw: tuple[int, int]) -> tuple[bytes, ...]:
    """[N, 1, m, m] probabilities inside boxes [N, 4] in tile pixels -> COCO run-length encodings of the tile."""
    counts = []
    for mask, box in zip(masks, boxes, strict=True):
        pasted = paste_masks_in_image(mask[None], box[None], tile_hw)[0, 0].numpy() > 0.5
        counts.append(encode_mask(np.asfortranarray(pasted, np.uint8)))
    return tuple(counts)


def load_torchvision(what: str, **settings: Unpack[TorchSettings]) -> TorchvisionDetector:
    """Load a torchvision detector.

    Args:
        what: NAME (torchvision's default weights, downloaded or cached), NAME@PATH, or PATH of a file of
            `save_detector` or of torchvision's weights under their original file name.
        settings: device, thresholds and precision.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConnectionError: if torchvision's weights can't be downloaded.
        UserError: if the name is unknown, or the weights do not match the detector.
    """
    name, at, path = what.partition("@")
    if at and name.isidentifier():
        model, categories, name = _from_file(path, name)
    elif what.endswith(SUFFIXES):
        model, categories, name = _from_file(what, None)
    else:
        model, categories, name = fetch_detector(what), COCO_CATEGORIES, what
    detector = TorchvisionDetector(model, categories, **settings)
    detector.name = name
    return detector


def save_detector(model: nn.Module, name: str, categories: Mapping[int, str], path: str) -> None:
    """Write a detector as a safetensors file that `torchvision:PATH` loads.

    Args:
        model: network of `build_detector(name, ...)` or of torchvision's builder `name`.
        name: one of `detector_names()`.
        categories: class id -> name, without the background 0.
        path: local path or a store's address that ends in .safetensors.

    Raises:
        UserError: if the model is another detector, or has no output for a category.
    """
    num_classes = _num_classes(model)
    outside = [category for category in categories if not 0 < category < num_classes]
    if outside or not categories:
        msg = f"category ids must be in 1..{num_classes - 1}, the model's classes, got {outside or 'none at all'}"
        raise UserError(msg)
    with torch.device("meta"):
        wanted = _shapes(build_detector(name, num_classes))
    differing = sorted(wanted.items() ^ _shapes(model).items())
    if differing:
        msg = f"the model must be a {name}, but they differ in {len(differing)} tensors, such as {differing[0][0]}"
        raise UserError(msg)
    metadata = {
        "detector": name,
        "num_classes": str(num_classes),
        "categories": json.dumps({str(category): categories[category] for category in sorted(categories)}),
        "norm_eps": json.dumps(norm_eps(model)),
    }
    save_weights(model.state_dict(), metadata, path)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the state dict, without num_batches_tracked, which frozen batch norms lack."""
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in state if not name.endswith("num_batches_tracked")}


def _num_classes(model: Any) -> int:
    """Number of classes of a model, including the background."""
    if hasattr(model, "roi_heads"):
        return model.roi_heads.box_predictor.cls_score.out_features
    head = model.head.classification_head
    return head.num_columns if hasattr(head, "num_columns") else head.num_classes


def _from_file(path: str, name: str | None) -> tuple[nn.Module, Mapping[int, str], str]:
    """Load a model, its categories, which without metadata are COCO's, and its name."""
    tensors, metadata = load_weights(path)
    of_file = metadata.get("detector") or published_name(path)
    if name is None and of_file is None:
        msg = f"{path} doesn't say which detector it is: name it as torchvision:NAME@{path}, or use save_detector"
        raise UserError(msg)
    if name is not None and of_file not in (None, name):
        msg = f"{path} must hold a {name}, got a {of_file}: load it as torchvision:{path}"
        raise UserError(msg)
    num_classes = int(metadata.get("num_classes", COCO_NUM_CLASSES))
    name = name or str(of_file)
    model = build_detector(name, num_classes)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        msg = f"the weights in {path} are not those of a {name} with {num_classes} classes: {reason}"
        raise UserError(msg) from error
    set_norm_eps(model, path, json.loads(metadata.get("norm_eps", "{}")))
    named = json.loads(metadata["categories"]) if "categories" in metadata else COCO_CATEGORIES
    return model, {int(category): title for category, title in named.items()}, name
