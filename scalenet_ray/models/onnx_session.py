"""Sessions of onnxruntime: device, threads, tiles per call, TensorRT's engines, and the errors of a damaged file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # type: ignore[attr-defined]

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.storage import read_bytes
from scalenet_ray.models.devices import is_tensorrt

_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

_NEWER = re.compile(r"IR version: \d+|Opset \d+")
_GPU = re.compile(r"(?:cuda|tensorrt)(?::([0-9]+))?")
_TENSORRT = "TensorrtExecutionProvider"

_MOST_TILES = 16
"""Tiles of the largest batch that an engine of TensorRT is built for."""

_USUAL_TILES = 8
"""Tiles of the batch that it is tuned for."""

_LOG = logging.getLogger(__name__)

HW = tuple[int, int]


def providers_of(device: str) -> list[Any]:
    """The execution providers of a device, for `onnxruntime.InferenceSession`.

    Args:
        device: "cpu", "cuda", "cuda:1", "tensorrt" or "tensorrt:1". TensorRT's are those of CUDA: a network is
            recognised on them before its engine is built (`with_engine`).

    Raises:
        UserError: if the name is another one, or this onnxruntime lacks CUDA or TensorRT.
    """
    if device == "cpu":
        return ["CPUExecutionProvider"]
    named = _GPU.fullmatch(device)
    if named is None:
        msg = f"device must be cpu, cuda, cuda:INDEX, tensorrt or tensorrt:INDEX, got {device!r}"
        raise UserError(msg)
    available = onnxruntime.get_available_providers()
    if not {"CUDAExecutionProvider", *([_TENSORRT] if is_tensorrt(device) else [])} <= set(available):
        msg = f"device {device!r} needs onnxruntime-gpu, got one with {available}: install it, or use device cpu"
        raise UserError(msg)
    # Its own choice for a convolution is a search among all algorithms at each new shape of a batch.
    settings = {"device_id": int(named[1] or 0), "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def session_options() -> onnxruntime.SessionOptions:
    """Options of a session: OMP_NUM_THREADS threads on the CPU if that is set."""
    options = onnxruntime.SessionOptions()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        options.intra_op_num_threads = int(threads)
    return options


def open_session(data: bytes, path: str, device: str) -> onnxruntime.InferenceSession:
    """Open the bytes of an ONNX file on a device, as for `providers_of`; `path` is its address, for messages.

    Raises:
        UserError: if it is no ONNX file, or one of a newer version; or onnxruntime has no such device.
    """
    providers = providers_of(device)
    try:
        session = onnxruntime.InferenceSession(data, session_options(), providers=providers)
    except _LOAD_ERRORS as error:
        if newer := _NEWER.search(str(error)):
            msg = f"{path} must be of a version that onnxruntime {onnxruntime.__version__} reads, got {newer[0]}: "
            raise UserError(f"{msg}export it with a lower opset, or install a newer onnxruntime") from error
        msg = f"{path} must be a whole ONNX file, got {len(data)} bytes that onnxruntime can't read: {error}"
        raise UserError(msg) from error
    if device != "cpu" and not on_gpu(session):
        msg = f"device {device!r} was wanted, but onnxruntime fell back to the CPU: check the GPU and its CUDA"
        raise UserError(msg)
    return session


def open_network(path: str, *names: str, device: str = "cpu") -> tuple[onnxruntime.InferenceSession, str, dict]:
    """Open an ONNX file of `scalenet-ray export-onnx`, local or in a store, on a device as for `providers_of`.

    Its metadata holds the configuration of the network under one of `names`, the kinds that are accepted.

    Returns:
        The session, the kind of the network, and its configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no ONNX file, or of another network.
    """
    session = open_session(read_bytes(path), path, device)
    metadata = session.get_modelmeta().custom_metadata_map
    kind = next((name for name in names if name in metadata), None)
    if kind is None:
        wanted = " or ".join(repr(name) for name in names)
        msg = (
            f"{path} must have {wanted} in its metadata, got {sorted(metadata)}: write it with scalenet-ray export-onnx"
        )
        raise UserError(msg)
    return session, kind, json.loads(metadata[kind])


def tiles_at_once(session: onnxruntime.InferenceSession | EngineSession, count: int) -> int:
    """Number of tiles per call out of `count` of one canvas.

    Tiles are batched on GPUs. On CPUs single tiles are faster, since activations stay in the cache.
    """
    most = _MOST_TILES if session.get_providers()[0] == _TENSORRT else count
    return max(1, min(count, most)) if on_gpu(session) else 1


def on_gpu(session: onnxruntime.InferenceSession | EngineSession) -> bool:
    """True if the network runs on a GPU, and not on the CPU."""
    return session.get_providers()[0] != "CPUExecutionProvider"


class EngineSession:
    """A session in TensorRT, with one on CUDA for canvases that its engine was not built for.

    It has the methods of `onnxruntime.InferenceSession`, of which all but `run` are the engine's. `largest` is the
    (height, width) of the engine's largest canvas.
    """

    def __init__(self, engine: Any, beyond: Any, largest: HW) -> None:
        self._engine, self._beyond, self._largest = engine, beyond, largest
        self._has_exceeded = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, names: Sequence[str] | None, feed: dict[str, Any], options: Any = None) -> Sequence[Any]:
        """Outputs of a batch; see `onnxruntime.InferenceSession.run`."""
        canvas: HW = next(iter(feed.values())).shape[-2:]
        if canvas[0] <= self._largest[0] and canvas[1] <= self._largest[1]:
            return self._engine.run(names, feed, options)
        if not self._has_exceeded:
            self._has_exceeded = True
            _LOG.warning("canvases over %d x %d run on CUDA: TensorRT's engine was not built for them", *self._largest)
        return self._beyond.run(names, feed, options)


def with_engine(
    session: onnxruntime.InferenceSession | EngineSession,
    data: bytes,
    path: str,
    device: str,
    canvas_hw: Callable[[HW], HW],
    input_side: int,
) -> EngineSession:
    """Build an engine of TensorRT for batches of a network's canvases, or read it from the user's cache.

    The engine takes canvases up to that of a tile of twice the input side, and batches of 1 to 16 tiles. It is built
    once for a file and a kind of GPU, which takes minutes: processes that want the same wait for the first.

    Args:
        session: the network on CUDA.
        data: content of its ONNX file.
        path: the file's address, for messages.
        device: "tensorrt" or "tensorrt:1".
        canvas_hw: (height, width) of a tile -> (height, width) of its canvas, if the network's size is free.
        input_side: longer side of a whole image's tile, in pixels.

    Raises:
        UserError: if TensorRT is not installed or can't build it.
    """
    image, *_ = inputs = session.get_inputs()
    *_, height, width = image.shape
    fixed = isinstance(height, int) and isinstance(width, int)
    canvases = [(height, width) if fixed else canvas_hw((side, side)) for side in (1, input_side, 2 * input_side)]
    free = [each for each in inputs if not all(isinstance(size, int) for size in each.shape)]
    profile = {}
    for name, tiles, canvas in zip(("min", "opt", "max"), (1, _USUAL_TILES, _MOST_TILES), canvases, strict=True):
        shapes = [f"{each.name}:{_shape_in_words(each.shape, tiles, canvas)}" for each in free]
        profile |= {f"trt_profile_{name}_shapes": ",".join(shapes)} if free else {}
    digest = hashlib.sha256(data + json.dumps(profile).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scalenet_ray" / "tensorrt" / digest
    folder.mkdir(parents=True, exist_ok=True)
    cache = {f"trt_{kind}_cache_enable": "1" for kind in ("engine", "timing")}
    cache |= {f"trt_{kind}_cache_path": str(folder) for kind in ("engine", "timing")}
    cuda, cpu = providers_of(device)
    providers = [(_TENSORRT, {"device_id": cuda[1]["device_id"], **cache, **profile}), cuda, cpu]
    _LOG.info("building TensorRT's engine of %s, or reading it from %s: the first time takes minutes", path, folder)
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Its fallback would be slow without notice.
            engine = onnxruntime.InferenceSession(data, session_options(), providers=providers, enable_fallback=0)
    except Exception as error:  # A library that is missing, or operators that TensorRT does not know.
        raise UserError(_no_engine(path, device, " ".join(str(error).split())[:300])) from error
    if engine.get_providers()[0] != _TENSORRT:
        raise UserError(_no_engine(path, device, "no error, but a session without it"))
    return EngineSession(engine, session, canvases[-1])


def _shape_in_words(shape: Sequence[Any], tiles: int, canvas: HW) -> str:
    """The shape of an input with numbers for its free axes, e.g. 16x3x640x640: batch, height and width."""
    known = {0: tiles, len(shape) - 2: canvas[0], len(shape) - 1: canvas[1]} if len(shape) > 2 else {0: tiles}
    return "x".join(str(size if isinstance(size, int) else known[axis]) for axis, size in enumerate(shape))


def _no_engine(path: str, device: str, got: str) -> str:
    return (
        f"device {device!r} must have an engine of TensorRT for {path}, got {got}: install TensorRT's libraries (pip "
        "install tensorrt) and name their folder, tensorrt_libs, in LD_LIBRARY_PATH, or use device cuda"
    )
