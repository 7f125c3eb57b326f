"""Adapter of Ultralytics' detectors, YOLOv8 to 26 and RT-DETR: `ultralytics:PATH`, without their resizing."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError
from scalenet_ray.core.masks import encode_mask
from scalenet_ray.core.merge import nms
from scalenet_ray.models.padding import STRIDE, in_tile, padded, square_canvas, stride_canvas
from scalenet_ray.models.torch_detector import ReadTile, TorchDetector, TorchSettings, finite_rows, without_autocast
from scalenet_ray.models.ultralytics_weights import import_ultralytics, load_checkpoint

_IOU_THRESHOLD = 0.7
"""Of Ultralytics' own NMS."""

_INPUT_SIDE = 640
_TRIED_SIDE = 192
"""Side of the canvas on which a model is tried when it is loaded: a multiple of all strides, with 300 cells."""

_COLUMNS = 6
"""x0, y0, x1, y1, score, class; then the coefficients of a mask."""

_MASKS_AT_ONCE = 16
_LOG = logging.getLogger(__name__)


class UltralyticsDetector(TorchDetector):
    """`Detector` with a network of Ultralytics, run on padded tiles; segmentation networks also return masks.

    A YOLO has rectangular canvases. RT-DETR, which was trained on squares of one size and predicts boxes as shares of
    them, has squares of at least that size.

    Attributes:
        model: the network.
        input_side: longer side of a whole image's tile, the size that it was trained at.
        categories: class index -> name.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS within each class; between tiles alone if the network needs no NMS.
        description: what the network is, in words.
    """

    def __init__(self, model: nn.Module, *, input_side: int = _INPUT_SIDE, **settings: Unpack[TorchSettings]) -> None:
        """Prepare a model for inference on tiles.

        Args:
            model: a detection or segmentation model of `ultralytics.nn.tasks`; changed in place (evaluation mode,
                fused, device).
            input_side: longer side of a whole image's tile.
            settings: device, thresholds and precision; the IoU threshold is 0.7 by default.

        Raises:
            UserError: if the model does another task, its names are not those of its classes, or the device is not
                available.
        """
        super().__init__(_IOU_THRESHOLD, **settings)
        self.model: Any = model
        head = self.model.model[-1]
        # It computes the boxes.
        head.forward = partial(without_autocast, head.forward)
        self._queries, self._masks = _kind_of(head)
        self.categories = _names(self.model.names, head.nc)
        self.model.eval().requires_grad_(False).fuse(verbose=False).to(self._device)
        self._suppressed = self._queries or bool(self.model.end2end)
        self._stride = max(STRIDE, int(max(self.model.stride)))
        self.input_side = input_side
        kind = "RT-DETR" if self._queries else "YOLO with masks" if self._masks else "YOLO"
        self.description = f"{kind} of Ultralytics, {'without' if self._suppressed else 'with'} NMS"

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas (height, width) of a tile of (height, width)."""
        if self._queries:
            return square_canvas(hw, self.input_side)
        return stride_canvas(hw, self._stride, self.input_side if self._on_gpu else None)

    def _forward(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> Any:
        return self.model(torch.from_numpy(padded(tiles, canvas)).to(self._device).permute(0, 3, 1, 2).float() / 255)[0]

    def _reader(self, outputs: Any, tiles: list[np.ndarray], canvas: tuple[int, int]) -> tuple[torch.Tensor, ReadTile]:
        output, prototypes = outputs if self._masks else (outputs, None)
        rows = self._rows(output.float(), canvas)
        kept = rows[..., 4] >= self.score_threshold
        # One copy for the batch, not for each tile.
        parts = rows[kept].cpu().split(kept.sum(1).tolist())
        return finite_rows(output), lambda i: self._read(
            parts[i], canvas, tiles[i].shape[:2], None if prototypes is None else prototypes[i]
        )

    def _rows(self, output: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
        """A batch's output -> [B, N, 6 or more]: xyxy in canvas pixels, score, class, coefficients of the mask."""
        if self._queries:
            height, width = canvas
            shares = output.new_tensor([width, height, width, height])
            return torch.cat([_corners(output[..., :4]) * shares, output[..., 4:]], dim=2)
        if self._suppressed:
            return output
        output = output.transpose(1, 2)
        boxes, scores, coefficients = output.tensor_split((4, 4 + len(self.categories)), dim=2)
        best, classes = scores.max(dim=2, keepdim=True)
        return torch.cat([_corners(boxes), best, classes, coefficients], dim=2)

    def _read(
        self, rows: torch.Tensor, canvas: tuple[int, int], tile_hw: tuple[int, int], prototypes: torch.Tensor | None
    ) -> Detections:
        """Rows of a tile, and the prototypes of its masks -> its detections in tile pixels."""
        boxes, scores, classes = rows[:, :4].numpy(), rows[:, 4].numpy(), rows[:, 5].numpy().astype(np.int64)
        if not self._suppressed:
            chosen = nms(boxes, scores, classes, self.iou_threshold)
            rows, boxes, scores, classes = rows[chosen], boxes[chosen], scores[chosen], classes[chosen]
        masks = None
        if prototypes is not None:
            # Those in the padding have none.
            masks, seen = _encode_masks(prototypes, rows, canvas, tile_hw)
            boxes, scores, classes = boxes[seen], scores[seen], classes[seen]
        return in_tile(Detections(boxes, scores, classes, masks=masks), tile_hw)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """[..., 4] cxcywh -> xyxy."""
    centres, halves = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


def _encode_masks(
    prototypes: torch.Tensor, rows: torch.Tensor, canvas: tuple[int, int], tile_hw: tuple[int, int]
) -> tuple[tuple[bytes, ...], np.ndarray]:
    """Masks of a tile's boxes.

    Args:
        prototypes: [M, h, w], on the device.
        rows: [N, 6 + M] xyxy in canvas pixels, score, class, coefficients.
        canvas: (height, width).
        tile_hw: (height, width).

    Returns:
        Run-length encodings on the tile of the masks that are not empty, and [N] bool: which these are.
    """
    process_mask = import_ultralytics("ultralytics.utils.ops").process_mask
    counts: list[bytes] = []
    seen = [np.zeros(0, bool)]
    # Full-size masks of all boxes take gigabytes.
    for some in rows.to(prototypes.device).split(_MASKS_AT_ONCE):
        found = process_mask(prototypes, some[:, _COLUMNS:], some[:, :4], canvas, upsample=True)
        pixels = found[:, : tile_hw[0], : tile_hw[1]].cpu().numpy()
        seen.append(pixels.any(axis=(1, 2)))
        counts += [encode_mask(np.asfortranarray(mask, np.uint8)) for mask in pixels[seen[-1]]]
    return tuple(counts), np.concatenate(seen)


def _kind_of(head: nn.Module) -> tuple[bool, bool]:
    """Kind of a head: true if it is RT-DETR's, and true if it gives masks.

    Raises:
        UserError: if it is of another task than detection or segmentation.
    """
    heads = import_ultralytics("ultralytics.nn.modules.head")
    if isinstance(head, heads.RTDETRDecoder):
        return True, False
    if not isinstance(head, heads.Detect) or isinstance(head, heads.Pose | heads.OBB):
        msg = f"a detector must detect or segment objects, got a model that ends in {type(head).__name__}: use another"
        raise UserError(msg)
    return False, isinstance(head, heads.Segment)


def _names(names: Any, count: int) -> dict[int, str]:
    """Class index -> name; refuses names that are not those of `count` classes."""
    named = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    if sorted(named) != list(range(count)):
        msg = f"a model of {count} classes must name them 0 to {count - 1}, got {len(named)} names: correct model.names"
        raise UserError(msg)
    return {int(index): str(name) for index, name in named.items()}


def load_ultralytics(what: str, **settings: Unpack[TorchSettings]) -> UltralyticsDetector:
    """Load a detector of Ultralytics, and try it on an empty canvas.

    Args:
        what: a .pt file of Ultralytics: local path or a store's address.
        settings: device, thresholds and precision; the IoU threshold is 0.7 by default.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if Ultralytics is not installed; if the file is no checkpoint of its or does not run in the installed
            version; if the model does another task, or its names are not those of its classes.
    """
    model, rest = load_checkpoint(what)
    side = (rest.get("train_args") or {}).get("imgsz", _INPUT_SIDE)
    try:
        input_side = max(side) if isinstance(side, list | tuple) else int(side)
        detector = UltralyticsDetector(model.float(), input_side=input_side, **settings)
        with torch.inference_mode():
            detector.model(torch.zeros(1, 3, _TRIED_SIDE, _TRIED_SIDE, device=settings.get("device", "cpu")))
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:  # A model of another version lacks what this one reads.
        installed = import_ultralytics("ultralytics").__version__
        wrote = f"version {rest['version']}" if rest.get("version") else "another version"
        text = " ".join(str(error).split())
        msg = (
            f"{what} must hold a model that runs in the installed Ultralytics, {installed}, got "
            f"{type(error).__name__}: {text}: it was written by {wrote}, install that one"
        )
        raise UserError(msg) from error
    _LOG.info("%s was taken for %s", what, detector.description)
    return detector
