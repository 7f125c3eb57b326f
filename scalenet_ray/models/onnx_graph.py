"""Edits of ONNX graphs: dynamic batch and size axes, feature maps as additional outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from scalenet_ray.core.errors import UserError

__all__ = [
    "expose_features",
    "free_axes",
]

_NAMES = ("batch", None, "height", "width")


def free_axes(data: bytes) -> bytes:
    """Make batch, height and width of the input [batch, channels, height, width] dynamic.

    YOLOX's exporter writes the batch of 1 into the inputs and into the targets of its last reshapes, [1, 85, -1]; a 0
    there copies the input's axis. The caller must test the result: a network may fix a size elsewhere too.

    Args:
        data: content of an ONNX file.

    Returns:
        Content of an ONNX file with the same weights; `data` if it cannot be parsed.
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
    for tensor in [*constants, *(constant for constant in graph.initializer if constant.name in targets)]:
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


def expose_features(data: bytes) -> bytes:
    """Add the feature map of each level to the outputs of a YOLOX network.

    YOLOX's head has two branches per level, boxes and classes, with a common input. That tensor, the last common
    ancestor of both branches, is found by a search upwards from the level's output, independent of names.

    Args:
        data: content of a YOLOX ONNX file, whose last Concat joins the outputs of all levels.

    Returns:
        Content of an ONNX file with the original outputs, and then one output per level, finest first: [batch,
        channels, height / stride, width / stride].

    Raises:
        UserError: if the network has another structure.
    """
    model = onnx.load_from_string(data)
    graph = _Graph(model.graph.node)
    names: list[str] = []
    ends = graph.joins(graph.maker[model.graph.output[0].name])
    answers = [above for end in ends for above in graph.producers(end)]
    for level in (join for answer in answers for join in graph.joins(answer)):
        branches = [graph.ancestors(above) for above in graph.producers(level)]
        # Nodes are in topological order: the last common one is the nearest.
        shared = set.intersection(*branches) if branches else set()
        if not shared:
            break
        names.append(graph.nodes[max(shared)].output[0])
    if len(names) < 2 or len(set(names)) != len(names):
        msg = f"the network must end in a Concat of its levels' answers, each of branches from one map, got {names}"
        raise UserError(msg)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return model.SerializeToString()


class _Graph:
    """Nodes of a network by index, in topological order."""

    def __init__(self, nodes: Sequence[NodeProto]) -> None:
        self.nodes = nodes
        self.maker = {output: i for i, node in enumerate(nodes) for output in node.output}

    def producers(self, at: int) -> list[int]:
        """Nodes that produce a node's inputs, in the order of the inputs."""
        return [self.maker[name] for name in self.nodes[at].input if name in self.maker]

    def ancestors(self, start: int) -> set[int]:
        """All nodes that a node depends on, including itself."""
        seen: set[int] = set()
        ahead = [start]
        while ahead:
            at = ahead.pop()
            if at not in seen:
                seen.add(at)
                ahead.extend(self.producers(at))
        return seen

    def joins(self, start: int) -> list[int]:
        """The nearest Concat on each path upwards from a node, including itself, in the order of the inputs."""
        found: list[int] = []
        seen: set[int] = set()
        ahead = [start]
        while ahead:
            at = ahead.pop()
            if at in seen:
                continue
            seen.add(at)
            if self.nodes[at].op_type == "Concat":
                found.append(at)
            else:
                ahead.extend(reversed(self.producers(at)))
        return found
