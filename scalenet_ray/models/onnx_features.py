"""The feature maps inside a YOLOX network in ONNX, as further outputs of the same forward pass."""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

__all__ = ["expose_features"]


def expose_features(data: bytes) -> bytes:
    """The same network with the feature map of each level as a further output.

    YOLOX's head has two branches at each level, boxes and classes, which start from one map: the last tensor
    that both of them come from. It is found by walking up from the level's answer, whatever the names are.

    Args:
        data: an ONNX file of YOLOX, its answers of all levels joined by the last Concat.

    Returns:
        An ONNX file whose outputs are the network's own and, the finest level first, [batch, channels,
        height / stride, width / stride] of each.

    Raises:
        ValueError: if the network is not built so.
    """
    model = onnx.load_from_string(data)
    graph = model.graph
    index = {output: i for i, node in enumerate(graph.node) for output in node.output}

    def producers(node: NodeProto) -> list[int]:
        return [index[name] for name in node.input if name in index]

    def ancestors(start: int) -> set[int]:
        seen: set[int] = set()
        ahead = [start]
        while ahead:
            at = ahead.pop()
            if at not in seen:
                seen.add(at)
                ahead.extend(producers(graph.node[at]))
        return seen

    def joins(start: int) -> list[int]:
        """The nearest Concat on each way up from a node, itself included."""
        if graph.node[start].op_type == "Concat":
            return [start]
        return [found for above in producers(graph.node[start]) for found in joins(above)]

    names: list[str] = []
    answers = [above for last in joins(index[graph.output[0].name]) for above in producers(graph.node[last])]
    for level in (join for answer in answers for join in joins(answer)):
        branches = [ancestors(above) for above in producers(graph.node[level])]
        # Nodes are in an order in which they can be computed: the last one that all branches share is nearest to them.
        shared = set.intersection(*branches) if branches else set()
        if not shared:
            break
        names.append(graph.node[max(shared)].output[0])
    if len(names) < 2 or len(set(names)) != len(names):
        msg = f"the network must end in a Concat of its levels' answers, each of branches from one map, got {names}"
        raise ValueError(msg)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return model.SerializeToString()
