"""Export a network of this package to ONNX, so that it runs without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from scalenet_ray.console import say
from scalenet_ray.core.errors import UserError, needs_extra
from scalenet_ray.data import storage


@dataclass(frozen=True)
class ExportOnnx:
    """Export a network of this package to ONNX, so that it runs without torch.

    The file holds the network's configuration. Give it as --scale-net PATH.onnx, or as --detector tiny:PATH.onnx.

    Attributes:
        weights: .safetensors of a Scale Net, of a scale head or of a tiny detector, a local path or a store's address.
        output: the ONNX file, local or in a store; by default beside the weights, ending in .onnx.
    """

    weights: Annotated[str, tyro.conf.Positional]
    output: str | None = None


def main(job: ExportOnnx) -> int:
    """Write the ONNX file and print its address.

    Raises:
        FileNotFoundError: if the weights are not there.
        UserError: if they are of another network, the output does not end in .onnx, or torch is not installed.
    """
    with needs_extra():
        # Here and not above: torch is loaded by what needs it alone.
        from scalenet_ray.models.onnx_export import export_predictor
        from scalenet_ray.models.weights import load_weights
        from scalenet_ray.sample.detector import export_tiny_detector
        from scalenet_ray.sample.tiny import TINY_DETECTOR
    output = job.output or f"{job.weights.removesuffix(PurePosixPath(job.weights).suffix)}.onnx"
    if not output.endswith(".onnx"):
        msg = f"--output must end in .onnx, got {output}: correct it"
        raise UserError(msg)
    _, header = load_weights(job.weights)
    export = export_tiny_detector if TINY_DETECTOR in header else export_predictor
    storage.write_bytes_atomic(output, export(job.weights))
    say(output)
    return 0
