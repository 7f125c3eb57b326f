"""ONNX graphs: dynamic batch and size axes, feature maps as additional outputs, a search for resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from scalenet_ray.core.errors import UserError

_NAMES = ("batch", None, "height", "width")

_END_OF_PIXELS = frozenset({"Conv", "ConvInteger", "Gemm", "MatMul", "QLinearConv", "Shape", "Size"})
"""Operators whose outputs are no pixels any more."""


def free_axes(data: bytes, *, sizes: bool = True) -> bytes:
    """Make batch, height and width of the input [batch, channels, height, width] dynamic.

    Exporters write the batch into the inputs and into the targets of reshapes. In [1, 85, -1] a 0 copies the input's
    axis, in [1, 2, 64, 400] a -1 takes what is left. The caller must test the result: a network may fix a size
    elsewhere too.

    Args:
        data: content of an ONNX file; returned as it is if it cannot be parsed.
        sizes: False to leave height and width as they are.
    """
    try:
        model = onnx.load_from_string(data)
    except DecodeError:
        return data
    graph = model.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_value
    live = _follow(graph, lambda node: True)
    reshapes = [node for node in graph.node if node.op_type == "Reshape"]
    targets = {node.input[1]: node.input[0] in live for node in reshapes}
    constants = [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.output[:1] and node.output[0] in targets
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    freed = set()
    for name, tensor in [*constants, *((value.name, value) for value in graph.initializer if value.name in targets)]:
        shape = numpy_helper.to_array(tensor)
        if shape.ndim != 1 or len(shape) < 2:
            continue
        has_rest = -1 in shape
        if shape[0] in (1, batch) if has_rest else shape[0] > 0 and targets[name]:
            target = np.concatenate([[0 if has_rest else -1], shape[1:]]).astype(shape.dtype)
            tensor.CopyFrom(numpy_helper.from_array(target, tensor.name))
            freed.add(name)
    for node in reshapes:
        # With `allowzero` a 0 would mean an empty axis.
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        if node.input[1] in freed and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    for value in graph.input:
        for name, dimension in zip(_NAMES, value.type.tensor_type.shape.dim, strict=False):
            if name == "batch" or (name is not None and sizes):
                dimension.dim_param = name
    for value in graph.output:
        for i, dimension in enumerate(value.type.tensor_type.shape.dim):
            dimension.dim_param = f"output_{i}"
    del graph.value_info[:]
    return model.SerializeToString()


def resizes_input(data: bytes) -> bool:
    """True if the network of an ONNX file's content resizes its input before its first convolution."""
    try:
        graph = onnx.load_from_string(data).graph
    except DecodeError:
        return False
    # The pixels alone: their shape may well decide the size of feature maps.
    pixels = _follow(graph, lambda node: node.op_type not in _END_OF_PIXELS)
    return any(node.op_type in ("Resize", "Upsample") and node.input[0] in pixels for node in graph.node)


def _follow(graph: onnx.GraphProto, passes: Callable[[NodeProto], bool]) -> set[str]:
    """Names of the tensors that depend on the inputs by way of nodes that pass."""
    weights = {constant.name for constant in graph.initializer}
    live = {value.name for value in graph.input} - weights
    for node in graph.node:
        if live.intersection(node.input) and passes(node):
            live.update(node.output)
    return live


def expose_features(data: bytes) -> bytes:
    """Add the feature map of each level to the outputs of a YOLOX network, [batch, channels, h, w], finest first.

    YOLOX's head has two branches per level, boxes and classes, with a common input. That tensor, the last common
    ancestor of both branches, is found by a search upwards from the level's output, independent of names.

    Args:
        data: content of a YOLOX ONNX file, whose last Concat joins the outputs of all levels.

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
