"""Sessions of onnxruntime: device, threads, tiles per call, and the errors of a damaged file."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # type: ignore[attr-defined]

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.storage import read_bytes

__all__ = ["on_gpu", "open_network", "open_session", "providers_of", "session_options", "tiles_at_once"]

_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

_NEWER = re.compile(r"IR version: \d+|Opset \d+")


def providers_of(device: str) -> list[Any]:
    """The execution providers of a device, for `onnxruntime.InferenceSession`.

    Args:
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: if the name is another one, or this onnxruntime has no CUDA.
    """
    kind, _, index = device.partition(":")
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda" or (index and not index.isdecimal()):
        msg = f"device must be cpu, cuda or cuda:INDEX, got {device!r}"
        raise UserError(msg)
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        msg = f"device {device!r} needs onnxruntime-gpu, got one with {available}: install it, or use device cpu"
        raise UserError(msg)
    # Its own choice for a convolution is a search among all algorithms at each new shape of a batch.
    settings = {"device_id": int(index or 0), "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def session_options() -> onnxruntime.SessionOptions:
    """Options of a session: OMP_NUM_THREADS threads on the CPU if that is set."""
    options = onnxruntime.SessionOptions()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        options.intra_op_num_threads = int(threads)
    return options


def open_session(data: bytes, path: str, device: str) -> onnxruntime.InferenceSession:
    """Open an ONNX file on a device.

    Args:
        data: the file's bytes.
        path: its address, for messages.
        device: "cpu", "cuda" or "cuda:1".

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
    if device != "cpu" and session.get_providers()[0] != "CUDAExecutionProvider":
        msg = f"device {device!r} was wanted, but onnxruntime fell back to the CPU: check the GPU and its CUDA"
        raise UserError(msg)
    return session


def open_network(path: str, *names: str, device: str = "cpu") -> tuple[onnxruntime.InferenceSession, str, dict]:
    """Open an ONNX file of `scalenet-ray export-onnx`, whose metadata holds its configuration.

    Args:
        path: a local path or a store's address.
        names: the kinds of network that are accepted; the configuration is under one of these keys.
        device: "cpu", "cuda" or "cuda:1".

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


def tiles_at_once(session: onnxruntime.InferenceSession, count: int) -> int:
    """Number of tiles per call out of `count` of one canvas.

    Tiles are batched on GPUs. On CPUs single tiles are faster, since activations stay in the cache.
    """
    return max(1, count) if on_gpu(session) else 1


def on_gpu(session: onnxruntime.InferenceSession) -> bool:
    """True if the network runs on a GPU, and not on the CPU."""
    return session.get_providers()[0] != "CPUExecutionProvider"
