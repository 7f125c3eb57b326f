"""Export of Scale Nets, scale heads and other networks from torch to ONNX, their configuration in the metadata."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from scalenet_ray.models.scale_net import load_torch_predictor
from scalenet_ray.models.scale_networks import SCALE_HEAD, SCALE_NET, ScaleHeadPredictor

_OPSET = 17
_REGRESSION_SIDE = 64
_HEAD_CELLS = 8
_MIN_HALVED = 1024
"""Least number of values of a weight that is worth a cast."""


def to_onnx(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> bytes:
    """Trace a network in evaluation mode and write it as an ONNX file, whose bytes are returned.

    Args:
        model: the network.
        inputs: one example for each input, e.g. [1, h, w, 3], of any shape that the network takes.
        axes: input name -> the axes of any size, by name; the inputs in order.
        outputs: names of the outputs.
        metadata: key -> text, stored in the file.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns of its own deprecation, and of sizes that the tracer keeps as they are.
        warnings.simplefilter("ignore")
        free = {name: {0: "batch"} for name in outputs} | {name: dict(sizes) for name, sizes in axes.items()}
        torch.onnx.export(
            model.eval().cpu(),
            tuple(inputs),
            buffer,  # type: ignore[arg-type]
            input_names=list(axes),
            output_names=list(outputs),
            dynamic_axes=free,
            opset_version=_OPSET,
            # The model is in evaluation mode; batch normalisation stays a node, which onnxruntime folds when it loads.
            training=torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    exported = onnx.load_from_string(buffer.getvalue())
    _store_halves(exported.graph)
    onnx.helper.set_model_props(exported, dict(metadata))
    return exported.SerializeToString()


def _store_halves(graph: onnx.GraphProto) -> None:
    """Store weights that float16 holds exactly as float16, with a cast, so that the file is half as large."""
    casts = []
    for weights in graph.initializer:
        values = onnx.numpy_helper.to_array(weights)
        if values.dtype == np.float32 and values.size >= _MIN_HALVED:
            with np.errstate(over="ignore"):
                halves = values.astype(np.float16)
            if np.array_equal(halves.astype(np.float32), values):
                name = weights.name
                weights.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}.half"))
                casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def export_predictor(path: str) -> bytes:
    """A trained Scale Net or scale head as an ONNX file, for `load_predictor`.

    A Scale Net takes any batch, and any size if its `input_side` is None; a scale head takes any batch and any size.

    Args:
        path: its weights, .safetensors, local or in a store.
    """
    predictor = load_torch_predictor(path)
    config: Any = predictor.config
    if isinstance(predictor, ScaleHeadPredictor):
        levels = [
            torch.zeros(1, channels, _HEAD_CELLS >> level, _HEAD_CELLS >> level)
            for level, channels in enumerate(config.feature_channels)
        ]
        sizes = {
            f"features_{level}": {0: "batch", 2: f"height_{level}", 3: f"width_{level}"} for level in range(len(levels))
        }
        return to_onnx(predictor.model, levels, sizes, ["prob"], {SCALE_HEAD: json.dumps(asdict(config))})
    side = config.input_side or _REGRESSION_SIDE
    axes = {0: "batch"} if config.input_side else {0: "batch", 1: "height", 2: "width"}
    tiles = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    output = "prob" if config.kind == "classes" else "scale"
    model = predictor.model.to(memory_format=torch.contiguous_format)
    return to_onnx(model, [tiles], {"tiles": axes}, [output], {SCALE_NET: json.dumps(asdict(config))})
