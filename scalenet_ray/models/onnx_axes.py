"""Free the batch, height and width that an ONNX export fixed, so that tiles of any canvas run in batches."""

from __future__ import annotations

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

__all__ = ["free_axes"]

_NAMES = ("batch", None, "height", "width")


def free_axes(data: bytes) -> bytes:
    """The same network with input [batch, channels, height, width] of free batch, height and width.

    YOLOX's exporter writes the batch of 1 into the inputs and into the targets of its last reshapes,
    [1, 85, -1]; a 0 there means "as it comes". Whether the result is right is for the caller to try: a network may
    hold a fixed size elsewhere too.

    Args:
        data: an ONNX file.

    Returns:
        An ONNX file with the same weights; `data` itself if it cannot be parsed.
    """
    try:
        model = onnx.load_from_string(data)
    except DecodeError:
        return data
    graph = model.graph
    targets = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    constants = [
        attribute.t
        for node in graph.node
        if node.output[:1] and node.output[0] in targets
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for tensor in [*constants, *(each for each in graph.initializer if each.name in targets)]:
        shape = numpy_helper.to_array(tensor)
        if shape.ndim == 1 and len(shape) > 1 and shape[0] == 1 and -1 in shape:
            freed = np.concatenate([[0], shape[1:]]).astype(shape.dtype)
            tensor.CopyFrom(numpy_helper.from_array(freed, tensor.name))
    for value in graph.input:
        for name, dimension in zip(_NAMES, value.type.tensor_type.shape.dim, strict=False):
            if name is not None:
                dimension.dim_param = name
    for value in graph.output:
        for i, dimension in enumerate(value.type.tensor_type.shape.dim):
            dimension.dim_param = f"output_{i}"
    del graph.value_info[:]
    return model.SerializeToString()
