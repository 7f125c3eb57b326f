"""Adapter of Ultralytics' detectors, YOLOv8 to 26 and RT-DETR: `ultralytics:PATH`, without their resizing."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import tempfile
import warnings
from functools import partial
from typing import Any, Unpack

import cv2
import numpy as np
import torch
from torch import nn
from torchvision.ops import box_convert

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import UserError, needs_extra
from scalenet_ray.core.masks import encode_mask
from scalenet_ray.core.merge import nms
from scalenet_ray.data.storage import read_bytes
from scalenet_ray.models.padding import STRIDE, in_tile, padded, square_canvas, stride_canvas
from scalenet_ray.models.torch_detector import ReadTile, TorchDetector, TorchSettings, finite_rows, without_autocast

_IOU_THRESHOLD = 0.7
"""Of Ultralytics' own NMS."""

_INPUT_SIDE = 640
_TRIED_SIDE = 192
"""Side of the canvas on which a model is tried when it is loaded: a multiple of all strides, with 300 cells."""

_COLUMNS = 6
"""x0, y0, x1, y1, score, class; then the coefficients of a mask."""

_MASKS_AT_ONCE = 16

_SUFFIX = ".pt"
_EXPECTED = "must be a checkpoint of Ultralytics: a detector of YOLOv8 to 26 or RT-DETR"
_MOST_NAMES = 3
_ITS_OWN = ("ultralytics.", "torch.", "numpy.", "pathlib.", "collections.", "builtins.getattr")
"""Beginnings of the names that Ultralytics' own checkpoints refer to."""

_LOG = logging.getLogger(__name__)


class UltralyticsDetector(TorchDetector):
    """`Detector` with a network of Ultralytics, run on padded tiles; segmentation networks also return masks.

    A YOLO has rectangular canvases. RT-DETR, which was trained on squares of one size and predicts boxes as shares of
    them, has squares of at least that size. If the network needs no NMS, the IoU threshold is that between tiles alone.
    """

    def __init__(self, model: nn.Module, *, input_side: int = _INPUT_SIDE, **settings: Unpack[TorchSettings]) -> None:
        """Prepare a model for inference on tiles.

        Args:
            model: a detection or segmentation model of `ultralytics.nn.tasks`; changed in place (evaluation mode,
                fused, device).
            input_side: longer side of a whole image's tile.
            settings: device, thresholds and precision; the IoU threshold is 0.7 by default.

        Raises:
            UserError: if the model does another task, its names are not its classes', or the device is not available.
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
            return torch.cat([box_convert(output[..., :4], "cxcywh", "xyxy") * shares, output[..., 4:]], dim=2)
        if self._suppressed:
            return output
        output = output.transpose(1, 2)
        boxes, scores, coefficients = output.tensor_split((4, 4 + len(self.categories)), dim=2)
        best, classes = scores.max(dim=2, keepdim=True)
        return torch.cat([box_convert(boxes, "cxcywh", "xyxy"), best, classes, coefficients], dim=2)

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


def _encode_masks(
    prototypes: torch.Tensor, rows: torch.Tensor, canvas: tuple[int, int], tile_hw: tuple[int, int]
) -> tuple[tuple[bytes, ...], np.ndarray]:
    """Run-length encodings on the tile of its boxes' masks that are not empty, and [N] bool: which these are.

    Args:
        prototypes: [M, h, w], on the device.
        rows: [N, 6 + M] xyxy in canvas pixels, score, class, coefficients.
        canvas: (height, width).
        tile_hw: (height, width).
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
    """Kind of a head: true if it is RT-DETR's, and true if it gives masks; refuses other tasks."""
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


# --- checkpoints, which are pickles, without running what is in them --------------------------------


def import_ultralytics(module: str) -> Any:
    """Import a module of Ultralytics, and undo what that changes in this process.

    Its import sets the number of OpenCV's threads to one, and OMP_NUM_THREADS where it is not set.

    Raises:
        UserError: if Ultralytics is not installed.
    """
    threads, omp = cv2.getNumThreads(), os.environ.get("OMP_NUM_THREADS")
    with needs_extra():
        found = importlib.import_module(module)
    cv2.setNumThreads(threads)
    if omp is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    return found


def load_checkpoint(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a .pt file by Ultralytics' restricted loader, which makes only what it knows: its classes and torch's.

    Returns:
        The model as it was saved, and the rest of the checkpoint.

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the installed Ultralytics has no such loader, or the file is no checkpoint of its, of another
            version, or damaged. Nothing of a file that is refused has been run.
    """
    if not path.endswith(_SUFFIX):
        msg = f"{path} {_EXPECTED}, that ends in {_SUFFIX}; for its exports use onnx:PATH"
        raise UserError(msg)
    load = import_ultralytics("ultralytics.nn.tasks").torch_safe_load
    if inspect.signature(load).parameters["safe_only"].default is not None:
        version = import_ultralytics("ultralytics").__version__
        # Before, `safe_only` meant a loader that runs what is in the file.
        msg = f"ultralytics:PATH needs ultralytics 8.4.70 or later, got {version}: pip install -U ultralytics"
        raise UserError(msg)
    with tempfile.NamedTemporaryFile(suffix=_SUFFIX) as copy:
        copy.write(read_bytes(path))
        copy.flush()
        file = copy.name
        _check_is_archive(file, path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint, _ = load(file, safe_only=True)
        except Exception as error:  # Another version's or a damaged file may raise anything.
            raise UserError(f"{path} {_EXPECTED}, {_reason(file, error)}") from error
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, nn.Module) or not hasattr(model, "names"):
        entries = ", ".join(sorted(map(str, checkpoint))[:_MOST_NAMES])
        content = f"the entries {entries}" if model is None else f"a {type(model).__name__}"
        raise UserError(f"{path} {_EXPECTED}, got {content}: save it with Ultralytics' own model.save()")
    return model, {key: value for key, value in checkpoint.items() if key not in ("ema", "model")}


def _check_is_archive(file: str, path: str) -> None:
    """Refuse what `torch.save` has not written."""
    try:
        torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # Damaged files raise many types of errors.
        kind = "TorchScript" if "torchscript" in str(error) else "a file that torch.save has not written, or not whole"
        raise UserError(f"{path} {_EXPECTED}, got {kind}: copy it again, or use onnx:PATH for an export") from error


def _reason(file: str, error: Exception) -> str:
    """Reason for which the restricted loader refuses a checkpoint."""
    version = import_ultralytics("ultralytics").__version__
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if any(name.startswith("models.") for name in names):
        return "got a model of the YOLOv5 or YOLOv7 repository: export it to ONNX, and use onnx:PATH"
    own = [name for name in names if name.startswith("ultralytics.")]
    if missing := [name for name in own if not _exists(name)]:
        return (
            f"of a version that the installed one, {version}, can read, got one with {missing[0]}, which it lacks: "
            "install the version that wrote it"
        )
    if foreign := [name for name in names if not name.startswith(_ITS_OWN)]:
        listed = ", ".join(foreign[:_MOST_NAMES])
        return f"got a pickle that calls {listed}, which no model needs: it was not run"
    text = " ".join(str(error).split())
    return f"which Ultralytics {version} can load with classes that it knows, got {type(error).__name__}: {text}"


def _exists(name: str) -> bool:
    """True if a class of Ultralytics can be imported; names of former versions count, since its loader maps them."""
    if not name.startswith("ultralytics.yolo"):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
    return True
