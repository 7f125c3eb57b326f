"""Adapter of the detectors of Hugging Face's transformers: `transformers:NAME_OR_PATH`, without their resizing."""

from __future__ import annotations

import importlib
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from scalenet_ray.core.detections import Detections
from scalenet_ray.core.errors import TileError, UserError, needs_extra
from scalenet_ray.data.storage import list_files, local_path, read_bytes
from scalenet_ray.models.padding import in_tile, square_canvas, stride_canvas
from scalenet_ray.models.torch_detector import ReadTile, TorchDetector, TorchSettings, finite_rows, without_autocast

_MASKED = ("conditional_detr", "deformable_detr", "detr", "table-transformer")
"""Types of models that take a mask of the padding, and whose boxes are shares of the tile without it."""

_SQUARE = ("d_fine", "rt_detr", "rt_detr_v2")
"""Types that were trained on squares of one size, and whose boxes are shares of the canvas."""

_FREE = ("yolos",)
"""Types without a mask for canvases of any size, whose boxes are shares of the canvas."""

_IOU_THRESHOLD = 0.7
"""Between tiles: none of these networks suppresses boxes."""

_FINEST_STRIDE = 8
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""NAME or OWNER/NAME."""

_OF_BOXES = re.compile(
    r"(^|\.)(bbox_predictor|bbox_embed\.\d+|(enc|pre)_bbox_head|integral|reference_points|ref_point_head)$"
)
"""Names of the modules that compute boxes or reference points from features."""

_LOG = logging.getLogger(__name__)


class TransformersDetector(TorchDetector):
    """`Detector` with a network of transformers, run on padded tiles.

    Its input side is that which its image processor would resize to.
    """

    def __init__(self, model: nn.Module, processor: Any, **settings: Unpack[TorchSettings]) -> None:
        """Prepare a model for inference on tiles.

        Args:
            model: a model of `AutoModelForObjectDetection`; changed in place (evaluation mode, device).
            processor: its image processor, whose normalization and decoding of outputs are used.
            settings: device, thresholds and precision; the IoU threshold is 0.7 by default.

        Raises:
            UserError: if the model is of an unknown type, names too few classes, or the device is not available.
        """
        super().__init__(_IOU_THRESHOLD, **settings)
        self.model: Any = model.eval().requires_grad_(False).to(self._device)  # type: ignore[call-overload]
        config = self.model.config
        self._processor = processor
        self._type = str(config.model_type)
        if self._type not in (*_MASKED, *_SQUARE, *_FREE):
            known = ", ".join(sorted((*_MASKED, *_SQUARE, *_FREE)))
            msg = f"a model of transformers must be of type {known}, got {self._type}: write a class around it"
            raise UserError(msg)
        self.categories = {int(index): str(name) for index, name in config.id2label.items()}
        self.input_side = _side_of(processor)
        if settings.get("mixed_precision"):
            _keep_boxes_exact(self.model)
        self._least = _least_side(config) if self._type in _MASKED else 1
        self._mean, self._deviation = _normalization(processor, self._device)
        padding = "with a mask of its padding" if self._type in _MASKED else "without a mask"
        self.description = f"{type(model).__name__} of transformers, {padding}, without NMS"

    def canvas_hw(self, hw: tuple[int, int]) -> tuple[int, int]:
        """Canvas (height, width) of a tile of (height, width)."""
        if self._type in _SQUARE:
            return square_canvas(hw, self.input_side)
        least = max(hw[0], self._least), max(hw[1], self._least)
        return stride_canvas(least, few_to=self.input_side if self._on_gpu else None)

    def _forward(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> Any:
        return self.model(**self._inputs(tiles, canvas))

    def _reader(self, outputs: Any, tiles: list[np.ndarray], canvas: tuple[int, int]) -> tuple[torch.Tensor, ReadTile]:
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        frames = [tile.shape[:2] if self._type in _MASKED else canvas for tile in tiles]
        found = self._processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=frames)
        # One copy for the batch: without a threshold all tiles have as many boxes.
        boxes, scores, labels = (
            torch.stack([each[key] for each in found]).cpu().numpy() for key in ("boxes", "scores", "labels")
        )
        finite = finite_rows([outputs.logits, outputs.pred_boxes])
        return finite, lambda i: self._read(boxes[i], scores[i], labels[i], tiles[i].shape[:2])

    def _inputs(self, tiles: list[np.ndarray], canvas: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Normalized tiles on canvases of zeros, as image processors pad, and the mask where the model takes one."""
        batch = torch.zeros((len(tiles), 3, *canvas), device=self._device)
        mask = torch.zeros((len(tiles), *canvas), dtype=torch.int64, device=self._device)
        for i, tile in enumerate(tiles):
            height, width = tile.shape[:2]
            # A copy: torch warns about read-only arrays.
            pixels = torch.from_numpy(tile.copy()).to(self._device).permute(2, 0, 1)
            batch[i, :, :height, :width] = (pixels - self._mean) / self._deviation
            mask[i, :height, :width] = 1
        return {"pixel_values": batch, "pixel_mask": mask} if self._type in _MASKED else {"pixel_values": batch}

    def _read(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, tile_hw: tuple[int, int]
    ) -> Detections | TileError:
        """All boxes of a tile -> its detections in tile pixels."""
        kept = scores >= self.score_threshold
        strange = set(labels[kept].tolist()) - set(self.categories)
        if strange:
            return TileError(
                f"the detector gave class {min(strange)}, its config.id2label names {len(self.categories)} classes: "
                "name all of them there"
            )
        return in_tile(Detections(boxes[kept], scores[kept], labels[kept]), tile_hw)


def _keep_boxes_exact(model: Any) -> None:
    """Compute boxes, reference points and anchors of a network outside of autocast; it is changed in place."""
    for name, module in model.named_modules():
        if _OF_BOXES.search(name):
            module.forward = partial(without_autocast, module.forward)
        if hasattr(module, "generate_anchors"):
            module.generate_anchors = partial(_anchors_in_float32, module.generate_anchors)
        if hasattr(module, "gen_encoder_output_proposals"):
            module.gen_encoder_output_proposals = partial(_of_wide_features, module.gen_encoder_output_proposals)


def _anchors_in_float32(generate: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a generator of anchors, which would give them in the type of the features."""
    return generate(*args, **{**settings, "dtype": torch.float32})


def _of_wide_features(propose: Callable[..., Any], features: torch.Tensor, *others: Any) -> Any:
    """Call a generator of first boxes, which gives them in the type of the features."""
    return propose(features.float(), *others)


def _side_of(processor: Any) -> int:
    """Side in pixels that an image processor resizes to: the shorter one where it keeps the aspect ratio."""
    size: Mapping[str, int] = dict(processor.size)
    for key in ("shortest_edge", "height", "max_height", "longest_edge"):
        if size.get(key):
            return int(size[key])
    msg = f"an image processor must have a size with height or shortest_edge, got {size}: correct its configuration"
    raise UserError(msg)


def _least_side(config: Any) -> int:
    """Least side of a canvas in tile pixels: its cells must be as many as the boxes that a two-stage model picks."""
    proposals = config.two_stage_num_proposals if getattr(config, "two_stage", False) else 1
    return _FINEST_STRIDE * math.ceil(math.sqrt(proposals))


def _normalization(processor: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[3, 1, 1] mean and deviation of pixels in 0..255, from an image processor's settings."""
    scale = 1.0 / float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, deviation = ((0.0,) * 3, (1.0,) * 3)
    if processor.do_normalize:
        mean, deviation = processor.image_mean, processor.image_std
    mean, deviation = (torch.tensor(part, device=device).reshape(3, 1, 1) * scale for part in (mean, deviation))
    return mean, deviation


def load_transformers(what: str, **settings: Unpack[TorchSettings]) -> TransformersDetector:
    """Load a detector of transformers.

    Args:
        what: a folder of `save_pretrained`, with the model's and the image processor's configuration and the weights:
            local path or a store's address; or a model's name on the Hugging Face Hub, downloaded or cached.
        settings: device, thresholds and precision; the IoU threshold is 0.7 by default.

    Raises:
        FileNotFoundError: if the path does not exist.
        ConnectionError: if a model can't be downloaded.
        UserError: if transformers is not installed, the folder lacks a file, the model is no detector of a known type,
            or its weights do not fit its configuration.
    """
    with needs_extra():
        transformers = importlib.import_module("transformers")
    with _quiet(transformers), _as_local_folder(what) as source:
        try:
            config = _checked(transformers.AutoConfig.from_pretrained(source), transformers, what)
            # Tensors of another shape are named below; transformers' error refers to a report that it logs.
            model, report = transformers.AutoModelForObjectDetection.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
            processor = transformers.AutoImageProcessor.from_pretrained(source)
        except UserError:
            raise
        except OSError as error:
            raise _missing(what, source, error) from error
        except Exception as error:  # Damaged weights, another version's, or a type that this one does not know.
            text = " ".join(str(error).split())[:300]
            msg = (
                f"{what} must hold a detector that transformers {transformers.__version__} loads, with weights and "
                f"class names that fit its configuration, got {type(error).__name__}: {text}"
            )
            raise UserError(msg) from error
    _check_weights(what, f"{type(model).__name__} of transformers {transformers.__version__}", report)
    try:
        detector = TransformersDetector(model, processor, **settings)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    _LOG.info("%s was taken for %s", what, detector.description)
    return detector


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no warning of transformers in the block; the user's own settings hold again after it."""
    log = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()


def _check_weights(what: str, network: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fill a network: transformers fills the rest with random numbers."""
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        msg = (
            f"{what} must hold all weights of a {network}, got {len(names)} tensors too few, such as {names[0]}: "
            "install the version that wrote it, or save it anew"
        )
        raise UserError(msg)
    if report["mismatched_keys"]:
        (name, got, wanted), *others = sorted(report["mismatched_keys"])
        msg = (
            f"{what} must hold weights that fit its configuration, got {len(others) + 1} tensors of another shape, "
            f"such as {name}, {list(got)} and not {list(wanted)}: name as many classes in its id2label as it has, "
            "or save it anew"
        )
        raise UserError(msg)


def _checked(config: Any, transformers: Any, what: str) -> Any:
    """The configuration of a detector, for canvases of any size; refuses another network's."""
    if type(config) not in transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING:
        msg = f"{what} must hold a detector of transformers, got a {config.model_type}: use one for object detection"
        raise UserError(msg)
    if getattr(config, "anchor_image_size", None) is not None:
        # Anchors are computed for each canvas instead.
        config.anchor_image_size = None
    return config


def _missing(what: str, source: str, error: OSError) -> Exception:
    """The error of a file that a folder lacks, or of a model that can't be downloaded."""
    text = " ".join(str(error).split())[:300]
    if source == what and not Path(source).exists():
        return ConnectionError(f"the model {what} is no folder here, and transformers can't fetch it: {text}")
    msg = f"{what} must be a folder of save_pretrained with a model, its weights and its image processor, got: {text}"
    return UserError(msg)


@contextmanager
def _as_local_folder(what: str) -> Iterator[str]:
    """A local folder, to which one elsewhere is copied, or the name of a model on the Hub."""
    local = local_path(what)
    if local is None:
        with tempfile.TemporaryDirectory() as folder:
            for uri in list_files(what):
                (Path(folder) / uri.rpartition("/")[2]).write_bytes(read_bytes(uri))
            yield folder
    elif Path(local).exists():
        yield local
    elif _ON_THE_HUB.fullmatch(what):
        yield what
    else:
        msg = f"there is no folder {local}"
        raise FileNotFoundError(msg)
