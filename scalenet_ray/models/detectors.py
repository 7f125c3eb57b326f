"""Protocol of detectors, validation of their attributes, and loading by name (`kind:what`)."""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from scalenet_ray.core.errors import EXTRAS, UserError, needs_extra
from scalenet_ray.core.networks import Detect, DetectWithFeatures
from scalenet_ray.core.policy import LARGEST_SIDE
from scalenet_ray.models.devices import is_tensorrt
from scalenet_ray.models.own_detectors import load_own, names_own, quoting

DETECTOR_GROUP = "scalenet_ray.detectors"
"""Entry point group in which a package registers kinds of detectors: kind = "package.module:function"."""

_LOADERS = {
    "onnx": "scalenet_ray.models.onnx_detector:load_onnx_detector",
    "tiny": "scalenet_ray.sample.tiny:load_tiny_detector",
    "torchvision": "scalenet_ray.models.torchvision_detectors:load_torchvision",
    "transformers": "scalenet_ray.models.transformers_detector:load_transformers",
    "ultralytics": "scalenet_ray.models.ultralytics_detector:load_ultralytics",
    "yolox-onnx": "scalenet_ray.models.onnx_detector:load_yolox",
}
"""Kind -> loader, imported on demand: an ONNX detector does not import torch."""

_OF_TORCH = ("tiny", "torchvision", "transformers", "ultralytics")
"""Kinds that support bfloat16 autocast."""

IN_ONNX = ("onnx", "yolox-onnx")
"""Kinds that run in onnxruntime."""

_LARGEST_CANVAS = 2 * LARGEST_SIDE
_MEMBERS = ("input_side", "categories", "iou_threshold", "canvas_hw", "__call__")


class Detector(Detect, Protocol):
    """Protocol of a detector: a batch of tiles -> detections in tile pixels.

    A detector pads a tile to its canvas (`canvas_hw`) and never resizes it, which would undo the zoom. The detections
    of a tile must not depend on the other tiles of the batch.

    A call returns a list with one output per tile: `Detections`, plain (boxes, scores, labels) or another format of
    `core.answers`, or a `TileError` for a tile on which the network returned NaN or infinite values, which fails that
    tile only. `CheckedDetector` validates the outputs.

    Attributes:
        input_side: longer side of a whole image's tile in tile pixels.
    """

    @property
    def categories(self) -> Mapping[int, str]:
        """Class id -> name; ids may be strings of digits, or the positions in a list of names."""
        ...

    @property
    def iou_threshold(self) -> float:
        """IoU threshold of its NMS; also used to merge the tiles of an image."""
        ...


class ShowsFeatures(DetectWithFeatures, Protocol):
    """Protocol of a detector that provides feature maps for a scale head."""

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the feature maps, finest first."""
        ...

    @property
    def feature_stride(self) -> int:
        """Cell side of the finest feature map in tile pixels; it doubles from map to map."""
        ...


def load_detector(
    spec: str,
    *,
    device: str = "cpu",
    score_threshold: float = 0.01,
    iou_threshold: float | None = None,
    mixed_precision: bool = False,
) -> Detector:
    """Load a detector by its name.

    Args:
        spec: `kind:what`: `onnx:PATH` or `onnx:PATH@NAMES` (one of the usual exports; NAMES is a text file of the
            classes' names); `yolox-onnx:PATH`; `torchvision:NAME` (torchvision's published weights),
            `torchvision:NAME@PATH` or `torchvision:PATH` (a file of `save_detector`); `ultralytics:PATH` (a .pt file);
            `transformers:NAME_OR_PATH` (a model of the Hugging Face Hub, or a folder); `tiny:PATH`; a kind that an
            installed package registers (`DETECTOR_GROUP`), whose function is called with the part after the colon and
            the next three arguments by name; or `module:NAME` or `module:NAME@ARGUMENT`, a class or a function of your
            own that is called with the argument and with what it takes of the next four, or an object. A path may be
            local or a store's address.
        device: torch device; or tensorrt or tensorrt:INDEX, for networks in ONNX only.
        score_threshold: minimum score of a detection.
        iou_threshold: IoU threshold of NMS within each class; None for the detector's own.
        mixed_precision: run under bfloat16 autocast; for networks in torch only.

    Raises:
        FileNotFoundError: if a file does not exist.
        ConnectionError: if torchvision's weights can't be downloaded.
        UserError: if the name, a threshold or a file is invalid, a class lacks a member of `Detector`, a package
            registers an existing kind, or the kind does not support mixed precision.
    """
    for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
        if value is not None and not 0.0 <= value <= 1.0:
            msg = f"{name} must be between 0 and 1, got {value}"
            raise UserError(msg)
    kind, _, what = spec.partition(":")
    settings: dict[str, Any] = {"device": device, "score_threshold": score_threshold, "iou_threshold": iou_threshold}
    check_kind_on(device, spec)
    added = _added_kind(kind)
    own = added is None and kind not in _LOADERS and names_own(spec)
    if kind in _OF_TORCH or own:
        settings["mixed_precision"] = mixed_precision
    elif mixed_precision:
        msg = (
            f"mixed precision is for detectors of kind {', '.join(_OF_TORCH)} or of your own, got {spec!r}, which has "
            "a precision of its own: leave mixed precision out"
        )
        raise UserError(msg)
    if added is not None and what:
        with quoting(spec):
            made = added.load()(what, **settings)
    elif kind in _LOADERS and what:
        with needs_extra(EXTRAS.get(kind)):
            load = pkgutil.resolve_name(_LOADERS[kind])
        made = load(what, **settings)
    elif own:
        try:
            made = load_own(spec, settings)
        except ModuleNotFoundError as error:
            msg = f"{_wanted()}, got {spec!r}: there is no module {error.name!r} here or among the installed ones"
            raise UserError(msg) from error
    else:
        msg = f"{_wanted()}, got {spec!r}"
        raise UserError(msg)
    declaration(made, spec)
    return made


def check_kind_on(device: str, spec: str) -> None:
    """Refuse a network in torch on a device of TensorRT.

    Raises:
        UserError: if the kind of a detector does not run there.
    """
    if is_tensorrt(device) and spec.partition(":")[0] in _OF_TORCH:
        msg = f"device {device!r} is for detectors in ONNX, such as onnx:PATH, got {spec!r}: use device cuda"
        raise UserError(msg)


def _added_kind(kind: str) -> EntryPoint | None:
    """Entry point that registers this kind, or None."""
    found = [point for point in entry_points(group=DETECTOR_GROUP) if point.name == kind]
    if len(found) + (kind in _LOADERS) > 1:
        owners = sorted({f"package {point.dist.name}" if point.dist else point.value for point in found})
        ours = ["scalenet_ray itself"] if kind in _LOADERS else []
        msg = f"a kind of detector must have one maker, got {kind!r} from {' and '.join(ours + owners)}: rename one"
        raise UserError(msg)
    return found[0] if found else None


def _wanted() -> str:
    kinds = sorted({*_LOADERS, *entry_points(group=DETECTOR_GROUP).names})
    return f"a detector must be kind:what with a kind of {', '.join(kinds)}, or module:Class of your own"


class DetectorInfo(NamedTuple):
    """Validated attributes of a detector; `takes_larger` is False if tiles above `input_side` do not fit it."""

    input_side: int
    iou_threshold: float
    categories: dict[int, str]
    takes_larger: bool = True


def declaration(detector: Any, name: str) -> DetectorInfo:
    """Validate the attributes of a detector, `name` in messages, and convert them to plain Python values.

    Raises:
        UserError: if it lacks a member, is a class instead of an instance, or an attribute is invalid.
    """
    with quoting(name):
        missing = [member for member in _MEMBERS if not hasattr(detector, member)]
    if missing:
        msg = f"detector {name!r} must have {', '.join(_MEMBERS)}, lacks {', '.join(missing)}: see Detector"
        raise UserError(msg)
    _check_object(detector, name)
    side, threshold = _number(detector.input_side), _number(detector.iou_threshold)
    if side is None or side < 1 or side != round(side):
        msg = f"input_side of detector {name!r} must be a whole number of pixels, got {detector.input_side!r}"
        raise UserError(msg)
    if threshold is None or not 0.0 <= threshold <= 1.0:
        msg = f"iou_threshold of detector {name!r} must be between 0 and 1, got {detector.iou_threshold!r}"
        raise UserError(msg)
    canvas_of(detector, (int(side), int(side)), name)
    larger = takes_tiles(detector, 2 * int(side), name)
    return DetectorInfo(int(side), float(threshold), _categories(detector.categories, name), larger)


def _check_object(detector: Any, name: str) -> None:
    if isinstance(detector, type) or not callable(detector):
        msg = f"detector {name!r} must be an object that can be called, got {type(detector).__name__}: make one of it"
        raise UserError(msg)


def takes_tiles(detector: Any, side: int, name: str) -> bool:
    """True if a detector has a canvas for square tiles of `side` pixels; see `canvas_of`."""
    try:
        canvas_of(detector, (side, side), name)
    except UserError:
        return False
    return True


def canvas_of(detector: Any, hw: tuple[int, int], name: str) -> tuple[int, int]:
    """Validated canvas (height, width) of a detector for a tile of (height, width).

    Raises:
        UserError: if it is not two whole numbers, smaller than the tile, or too large.
    """
    try:
        answer = detector.canvas_hw(hw)
        sides = [_number(side) for side in answer]
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # The detector may be the user's own code.
        msg = f"canvas_hw of detector {name!r} must answer {hw} with (height, width), it raised "
        raise UserError(f"{msg}{type(error).__name__}: {error}") from error
    height, width = sides if len(sides) == 2 else (None, None)
    if height is None or width is None or height != round(height) or width != round(width):
        msg = f"canvas_hw of detector {name!r} must be two whole numbers, (height, width), got {answer!r} for {hw}"
        raise UserError(msg)
    if height < hw[0] or width < hw[1]:
        msg = (
            f"canvas_hw of detector {name!r} must be at least as large as the tile, got {height} x {width} for a tile "
            f"of {hw[0]} x {hw[1]}: a detector that shrinks its tiles undoes the zoom; let it compute larger ones, or "
            "choose a policy with smaller tiles"
        )
        raise UserError(msg)
    if max(height, width) > _LARGEST_CANVAS:
        msg = (
            f"canvas_hw of detector {name!r} must be at most {_LARGEST_CANVAS} pixels a side, got {height} x {width} "
            f"for a tile of {hw[0]} x {hw[1]}: choose a policy with smaller tiles"
        )
        raise UserError(msg)
    return int(height), int(width)


def _number(value: Any) -> float | None:
    """Convert a finite Python, numpy or torch number; None for anything else, including bool and str."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    return value if is_number and -1e300 < value < 1e300 else None  # type: ignore[return-value,operator]


def _categories(declared: Any, name: str) -> dict[int, str]:
    """Class id -> name, from a mapping or from a list of names, whose ids are their positions."""
    if isinstance(declared, list | tuple) or (isinstance(declared, np.ndarray) and declared.ndim == 1):
        rows: list[tuple[Any, Any]] = list(enumerate(declared))
    elif isinstance(declared, Mapping):
        rows = list(declared.items())
    else:
        msg = f"categories of detector {name!r} must map class ids to names, or list the names, got "
        raise UserError(f"{msg}{type(declared).__name__}")
    ids = [_class_id(key, name) for key, _ in rows]
    if repeated := [class_id for class_id, count in Counter(ids).items() if count > 1]:
        msg = f"categories of detector {name!r} must have each class id once, got twice {repeated[0]}: number them"
        raise UserError(msg)
    if not rows:
        msg = f"categories of detector {name!r} must name at least one class, got none"
        raise UserError(msg)
    found = {class_id: text for class_id, (_, text) in zip(ids, rows, strict=True)}
    for class_id, text in found.items():
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            msg = f"name of class {class_id} of detector {name!r} must be text, got {text!r}"
            raise UserError(msg)
    return {class_id: str(text) for class_id, text in found.items()}


def _class_id(key: Any, name: str) -> int:
    if isinstance(key, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", key):
        return int(key)
    number = _number(key)
    if number is None or number != round(number) or abs(number) >= 2**53:
        msg = f"class ids of detector {name!r} must be whole numbers, got {key!r}: number them as its labels are"
        raise UserError(msg)
    return int(number)
