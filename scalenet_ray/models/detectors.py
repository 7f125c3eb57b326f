"""Frozen detectors behind one protocol, named `kind:what`."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.inference import Detect, DetectWithFeatures
from scalenet_ray.core.policy import LARGEST_SIDE

__all__ = [
    "DETECTOR_GROUP",
    "Detector",
    "DetectorInfo",
    "ShowsFeatures",
    "canvas_of",
    "check_detector",
    "declaration",
    "load_detector",
]

DETECTOR_GROUP = "scalenet_ray.detectors"
"""The entry points by which an installed package adds kinds of detectors: kind = "package.module:function"."""


_LOADERS = {
    "tiny": "scalenet_ray.sample.detector:TinyDetector.load",
    "torchvision": "scalenet_ray.models.torchvision_detectors:load_torchvision",
    "yolox-onnx": "scalenet_ray.models.yolox:YoloxDetector.load",
}
"""Kind -> where its loader is; imported when asked for, so that an ONNX detector never loads torch."""


_OF_TORCH = ("tiny", "torchvision")
"""Kinds that can compute in bfloat16; the networks of the others are in the precision that their makers gave them."""


_OWN_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


_LARGEST_CANVAS = 2 * LARGEST_SIDE


_MEMBERS = ("input_side", "categories", "iou_threshold", "canvas_hw", "__call__")


class Detector(Detect, Protocol):
    """Tiles' pixels -> detections in tile pixels, a batch at a time.

    A tile comes at the size it shall be looked at: a detector pads it (`canvas_hw`) and never resizes it,
    or it would undo the zoom. Tiles of one canvas are computed together, and each tile's detections are what
    they would be if it came alone.

    A call returns a list, an answer for each tile. A `TileError` stands for a tile that the network broke on (NaN or
    infinite values): it costs that tile alone. Plain (boxes, scores, labels) are taken too: see `core.answers`.
    `CheckedDetector` checks all of this.

    Attributes:
        input_side: the longer side of a whole image's tile, in tile pixels.
    """

    @property
    def categories(self) -> Mapping[int, str]:
        """The detector's own class ids, its labels, with their names; ids may be text, or the places in a list."""
        ...

    @property
    def iou_threshold(self) -> float:
        """The overlap above which it suppresses a box; the merge of an image's tiles uses it again."""
        ...


class ShowsFeatures(DetectWithFeatures, Protocol):
    """A detector whose feature maps a scale head may read."""

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """C of each of its feature maps, the finest first."""
        ...

    @property
    def feature_stride(self) -> int:
        """Tile pixels along a side of a cell of the finest; each coarser one's cells are twice as long."""
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
        spec: `kind:what`: `yolox-onnx:PATH`; `torchvision:NAME` (torchvision's own weights, from the network),
            `torchvision:NAME@PATH`, `torchvision:PATH` (a file of `save_detector`); `tiny:PATH`; a kind that an
            installed package adds (`DETECTOR_GROUP`), whose function is called with what stands after the colon and
            the next three settings by name; or `module:Class`, a class of yours that is made without arguments and
            sets its thresholds itself. A path may be local, file:// or s3://.
        device: where it computes, as torch names it.
        score_threshold: boxes that score less are dropped.
        iou_threshold: overlap above which a box of the same class is suppressed; None for the detector's own.
        mixed_precision: compute in bfloat16 what bears it; for torchvision: and tiny: alone.

    Returns:
        The detector, ready for tiles.

    Raises:
        FileNotFoundError: if a file is not there.
        ConnectionError: if torchvision's weights can't be fetched.
        UserError: if the name, a threshold or a file is not what it must be, a class lacks part of `Detector`,
            packages add a kind that is there already, or the detector has a precision of its own.
    """
    for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
        if value is not None and not 0.0 <= value <= 1.0:
            msg = f"{name} must be between 0 and 1, got {value}"
            raise UserError(msg)
    kind, _, what = spec.partition(":")
    settings: dict[str, Any] = {
        "device": device,
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
    }
    if kind in _OF_TORCH:
        settings["mixed_precision"] = mixed_precision
    elif mixed_precision:
        msg = (
            f"mixed precision is for detectors of kind {' or '.join(_OF_TORCH)}, got {spec!r}, which has a precision "
            "of its own: leave mixed precision out"
        )
        raise UserError(msg)
    added = _added_kind(kind)
    if added is not None and what:
        with _quoting(spec):
            made = added.load()(what, **settings)
        return check_detector(made, spec)
    if kind in _LOADERS and what:
        return check_detector(pkgutil.resolve_name(_LOADERS[kind])(what, **settings), spec)
    if added is not None or kind in _LOADERS or not _OWN_CLASS.fullmatch(spec):
        msg = f"{_wanted()}, got {spec!r}"
        raise UserError(msg)
    return _load_own(spec)


def _added_kind(kind: str) -> EntryPoint | None:
    """The entry point of an installed package that adds this kind, or None."""
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
    """What a detector declares: its side, its NMS threshold, its classes."""

    input_side: int
    iou_threshold: float
    categories: dict[int, str]


def check_detector(detector: Any, name: str) -> Detector:
    """The detector, having looked that it has all parts of `Detector`, and that they are what they must be.

    Args:
        detector: what shall be one.
        name: what messages call it.

    Raises:
        UserError: if it lacks a part, or what it declares is wrong; it names that.
    """
    declaration(detector, name)
    return detector


def declaration(detector: Any, name: str) -> DetectorInfo:
    """What a detector declares, in plain numbers and text, whatever numbers (numpy's, torch's) it uses itself.

    Args:
        detector: the detector.
        name: what messages call it.

    Raises:
        UserError: if it lacks a part, is a class in place of an object of it, or a part is not what it must be.
    """
    with _quoting(name):
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
    info = DetectorInfo(int(side), float(threshold), _categories(detector.categories, name))
    canvas_of(detector, (info.input_side, info.input_side), name)
    return info


def _check_object(detector: Any, name: str) -> None:
    if isinstance(detector, type) or not callable(detector):
        msg = f"detector {name!r} must be an object that can be called, got {type(detector).__name__}: make one of it"
        raise UserError(msg)


def canvas_of(detector: Any, hw: tuple[int, int], name: str) -> tuple[int, int]:
    """(height, width) that a detector computes for a tile of (height, width), in tile pixels.

    Raises:
        UserError: if what it says is not two whole numbers, or smaller than the tile, which it would have to shrink.
    """
    try:
        answer = detector.canvas_hw(hw)
        sides = [_number(side) for side in answer]
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # It is the user's own code.
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
    """A finite number of Python's, numpy's or torch's; None if it is none, as truth values and text are."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    return value if is_number and -1e300 < value < 1e300 else None  # type: ignore[return-value,operator]


def _categories(declared: Any, name: str) -> dict[int, str]:
    """Class id -> name, from a mapping, or from a list of names: an id is a place in it."""
    if isinstance(declared, list | tuple) or (isinstance(declared, np.ndarray) and declared.ndim == 1):
        rows: list[tuple[Any, Any]] = list(enumerate(declared))
    elif isinstance(declared, Mapping):
        rows = list(declared.items())
    else:
        msg = f"categories of detector {name!r} must map class ids to names, or list the names, got "
        raise UserError(f"{msg}{type(declared).__name__}")
    ids = [_class_id(key, name) for key, _ in rows]
    if twice := [class_id for class_id, count in Counter(ids).items() if count > 1]:
        msg = f"categories of detector {name!r} must have each class id once, got twice {twice[0]}: number them"
        raise UserError(msg)
    if not rows:
        msg = f"categories of detector {name!r} must name at least one class, got none"
        raise UserError(msg)
    for class_id, text in zip(ids, (text for _, text in rows), strict=True):
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            msg = f"name of class {class_id} of detector {name!r} must be text, got {text!r}"
            raise UserError(msg)
    return {class_id: str(text) for class_id, (_, text) in zip(ids, rows, strict=True)}


def _class_id(key: Any, name: str) -> int:
    if isinstance(key, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", key):
        return int(key)
    number = _number(key)
    if number is None or number != round(number) or abs(number) >= 2**53:
        msg = f"class ids of detector {name!r} must be whole numbers, got {key!r}: number them as its labels are"
        raise UserError(msg)
    return int(number)


def _load_own(spec: str) -> Detector:
    """A user's class, imported as `python -m` would from the current directory, and made."""
    module_name, _, class_name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with _quoting(spec):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        msg = f"{_wanted()}, got {spec!r}: there is no module {error.name!r} here or among the installed ones"
        raise UserError(msg) from error
    if not hasattr(module, class_name):
        msg = f"module {module_name} must have a class {class_name!r} for detector {spec!r}, got none of that name"
        raise UserError(msg)
    with _quoting(spec):
        made = _made(getattr(module, class_name), spec)
    return check_detector(made, spec)


def _made(kind: Any, spec: str) -> Any:
    """An object of a user's class."""
    wanted = f"detector {spec!r} must name a class that is made without arguments"
    if not isinstance(kind, type):
        msg = f"{wanted}, got a {type(kind).__name__}: write a class around it, see Detector"
        raise UserError(msg)
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        msg = f"{wanted}, got one with {error}: give its arguments defaults, or derive a class that sets them"
        raise UserError(msg) from None
    except ValueError:
        # A class that is written in C may not tell.
        pass
    return kind()


@contextmanager
def _quoting(spec: str) -> Iterator[None]:
    """What others' code raises while it is imported and makes a detector is for its owner to correct.

    Raises:
        UserError: that names the detector and quotes the error; one raised in the block is let through, and so is
            the word that the detector's own module is not there.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        module_name = spec.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next(frame for frame in reversed(frames) if not frame.filename.startswith("<frozen importlib"))
        msg = (
            f"detector {spec!r} could not be made, it raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        )
        raise UserError(msg) from error
