"""Reading and writing of weights without running code: safetensors, or state dicts in PyTorch's pickle format."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from scalenet_ray.core.errors import UserError
from scalenet_ray.data.storage import read_bytes, write_bytes_atomic

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Supported suffixes of weight files."""


def load_weights(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a file of weights, local or in a store, with one of `SUFFIXES`; pickles without running code.

    Returns:
        The tensors by name, on the CPU, and the file's metadata ({} for a pickle).

    Raises:
        FileNotFoundError: if the file does not exist.
        UserError: if the suffix is unknown, or the file is damaged or holds anything but tensors.
    """
    if not path.endswith(SUFFIXES):
        msg = f"weights must be a file that ends in {', '.join(SUFFIXES)}, got {path!r}"
        raise UserError(msg)
    data = read_bytes(path)
    if path.endswith(".safetensors"):
        return _parse_safetensors(data, path)
    return _parse_pickle(data, path), {}


def save_weights(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: str) -> None:
    """Write tensors on any device and metadata, as `load_weights` returns them, as a safetensors file, atomically.

    Args:
        tensors: by name.
        metadata: key -> text.
        path: local path or a store's address that ends in .safetensors.
    """
    # safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes_atomic(path, save(copies, dict(metadata)))


def _parse_safetensors(data: bytes, path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = load(data)
    except SafetensorError as error:
        msg = f"{path} must be a whole safetensors file, got {len(data)} bytes that are none ({error}): copy it again"
        raise UserError(msg) from error
    # The library reads metadata from local files only. The header is JSON, after its length in eight bytes.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _parse_pickle(data: bytes, path: str) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged files raise many types of errors.
        reason = str(error).partition("\n")[0]
        msg = f"{path} must hold tensors alone, whole and without code, got: {reason} Save the model's state_dict()"
        raise UserError(msg) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        content = f"entries {sorted(map(str, found))[:5]}" if isinstance(found, dict) else f"a {type(found).__name__}"
        msg = f"{path} must be a state dict, tensors by name, got {content}: save the model's state_dict()"
        raise UserError(msg)
    return found
