"""Reading of Ultralytics' checkpoints, which are pickles, without running what is in them."""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch import nn

from scalenet_ray.core.errors import UserError, needs_extra
from scalenet_ray.data.storage import local_path, read_bytes

_SUFFIX = ".pt"
_EXPECTED = "must be a checkpoint of Ultralytics: a detector of YOLOv8 to 26 or RT-DETR"
_MOST_NAMES = 3
_ITS_OWN = ("ultralytics.", "torch.", "numpy.", "pathlib.", "collections.", "builtins.getattr")
"""Beginnings of the names that Ultralytics' own checkpoints refer to."""


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
    """Load a model of Ultralytics by its restricted loader, which makes only what it knows: its classes and torch's.

    Args:
        path: a .pt file: local path or a store's address.

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
        # Before, `safe_only` meant a loader that runs what is in the file.
        msg = f"ultralytics:PATH needs ultralytics 8.4.70 or later, got {_version()}: pip install -U ultralytics"
        raise UserError(msg)
    with _as_local_file(path) as file:
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


def _version() -> str:
    return str(importlib.import_module("ultralytics").__version__)


@contextmanager
def _as_local_file(path: str) -> Iterator[str]:
    """A local path of a file in any storage."""
    local = local_path(path)
    if local is None:
        with tempfile.NamedTemporaryFile(suffix=_SUFFIX) as copy:
            copy.write(read_bytes(path))
            copy.flush()
            yield copy.name
    elif os.path.exists(local):
        yield local
    else:
        msg = f"there is no file {local}"
        raise FileNotFoundError(msg)


def _check_is_archive(file: str, path: str) -> None:
    """Refuse what `torch.save` has not written."""
    try:
        torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # Damaged files raise many types of errors.
        kind = "TorchScript" if "torchscript" in str(error) else "a file that torch.save has not written, or not whole"
        raise UserError(f"{path} {_EXPECTED}, got {kind}: copy it again, or use onnx:PATH for an export") from error


def _reason(file: str, error: Exception) -> str:
    """Reason for which the restricted loader refuses a checkpoint."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if any(name.startswith("models.") for name in names):
        return "got a model of the YOLOv5 or YOLOv7 repository: export it to ONNX, and use onnx:PATH"
    own = [name for name in names if name.startswith("ultralytics.")]
    if missing := [name for name in own if not _exists(name)]:
        return (
            f"of a version that the installed one, {_version()}, can read, got one with {missing[0]}, which it lacks: "
            "install the version that wrote it"
        )
    if foreign := [name for name in names if not name.startswith(_ITS_OWN)]:
        listed = ", ".join(foreign[:_MOST_NAMES])
        return f"got a pickle that calls {listed}, which no model needs: it was not run"
    text = " ".join(str(error).split())
    return f"which Ultralytics {_version()} can load with classes that it knows, got {type(error).__name__}: {text}"


def _exists(name: str) -> bool:
    """True if a class of Ultralytics can be imported; names of former versions count, since its loader maps them."""
    module, _, attribute = name.rpartition(".")
    if module.startswith("ultralytics.yolo"):
        return True
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False
