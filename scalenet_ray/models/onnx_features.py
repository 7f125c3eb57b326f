"""The feature maps inside a YOLOX network in ONNX, as further outputs of the same forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from scalenet_ray.core.errors import UserError

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
        UserError: if the network is not built so.
    """
    model = onnx.load_from_string(data)
    graph = _Graph(model.graph.node)
    names: list[str] = []
    ends = graph.joins(graph.maker[model.graph.output[0].name])
    answers = [above for end in ends for above in graph.producers(end)]
    for level in (join for answer in answers for join in graph.joins(answer)):
        branches = [graph.ancestors(above) for above in graph.producers(level)]
        # Nodes are in an order in which they can be computed: the last one that all branches share is nearest to them.
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
    """The nodes of a network by number, in an order in which they can be computed."""

    def __init__(self, nodes: Sequence[NodeProto]) -> None:
        self.nodes = nodes
        self.maker = {output: i for i, node in enumerate(nodes) for output in node.output}

    def producers(self, at: int) -> list[int]:
        """The nodes that a node takes its input from, in the order of its inputs."""
        return [self.maker[name] for name in self.nodes[at].input if name in self.maker]

    def ancestors(self, start: int) -> set[int]:
        """All that a node depends on, itself included."""
        seen: set[int] = set()
        ahead = [start]
        while ahead:
            at = ahead.pop()
            if at not in seen:
                seen.add(at)
                ahead.extend(self.producers(at))
        return seen

    def joins(self, start: int) -> list[int]:
        """The nearest Concat on each way up from a node, itself included; each once, the first inputs' first."""
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
