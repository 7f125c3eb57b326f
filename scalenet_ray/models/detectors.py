"""Frozen detectors behind one protocol, named `kind:what`."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from scalenet_ray.core.errors import UserError
from scalenet_ray.core.look import Detect, DetectWithFeatures

__all__ = ["DETECTOR_GROUP", "Detector", "ShowsFeatures", "check_detector", "load_detector"]

DETECTOR_GROUP = "scalenet_ray.detectors"
"""The entry points by which an installed package adds kinds of detectors: kind = "package.module:function"."""

_LOADERS = {
    "tiny": "scalenet_ray.models.tiny_detector:TinyDetector.load",
    "torchvision": "scalenet_ray.models.torchvision_detectors:load_torchvision",
    "yolox-onnx": "scalenet_ray.models.yolox:YoloxDetector.load",
}
"""Kind -> where its loader is; imported when asked for, so that an ONNX detector never loads torch."""

_OF_TORCH = ("tiny", "torchvision")
"""Kinds that can compute in bfloat16; the networks of the others are in the precision that their makers gave them."""

_OWN_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_MEMBERS = ("input_side", "categories", "iou_threshold", "canvas_hw", "__call__")


class Detector(Detect, Protocol):
    """Tiles' pixels -> detections in tile pixels, a batch at a time.

    A tile comes at the size it shall be looked at: a detector pads it (`canvas_hw`) and never resizes it,
    or it would undo the zoom. Tiles of one canvas are computed together, and each tile's detections are what
    they would be if it came alone. [] gives [].

    In the list that a call returns, a `TileError` stands for a tile that the network broke on (NaN or infinite
    values): it costs that tile alone. It is returned and not raised, so that the rest of the batch is not lost.

    Attributes:
        input_side: the longer side of a whole image's tile, in tile pixels.
    """

    @property
    def categories(self) -> Mapping[int, str]:
        """The detector's own class ids, its labels, with their names."""
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
        ValueError: if the name, a threshold or a file is not what it must be, a class lacks part of `Detector`,
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
        return pkgutil.resolve_name(_LOADERS[kind])(what, **settings)
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


def check_detector(detector: Any, name: str) -> Detector:
    """The detector, having looked that it has all parts of `Detector`.

    Args:
        detector: what shall be one.
        name: what messages call it.

    Raises:
        ValueError: if it lacks a part; it names those.
    """
    missing = [member for member in _MEMBERS if not hasattr(detector, member)]
    if missing:
        msg = f"detector {name!r} must have {', '.join(_MEMBERS)}, lacks {', '.join(missing)}: see Detector"
        raise UserError(msg)
    return detector


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
        made = getattr(module, class_name)()
    return check_detector(made, spec)


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
    except Exception as error:
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
