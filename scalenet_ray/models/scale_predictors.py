"""Scale predictors by file: Scale Nets and scale heads as ONNX run on onnxruntime, as safetensors in torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from scalenet_ray.core.errors import UserError, needs_extra
from scalenet_ray.models.onnx_session import open_network
from scalenet_ray.models.scale_networks import (
    SCALE_HEAD,
    SCALE_NET,
    FeaturePredictor,
    HeadConfig,
    ScaleNetConfig,
    TilePredictor,
    head_config,
    net_config,
)

if TYPE_CHECKING:
    from scalenet_ray.models.scale_head import ScaleHeadPredictor
    from scalenet_ray.models.scale_net import ScaleNetPredictor

ONNX_SUFFIX = ".onnx"
"""The ending of a network's file that onnxruntime reads."""


class OnnxScaleNet(TilePredictor):
    """A Scale Net exported to ONNX as `ScalePredictor`: tiles' pixels -> scale maps, without torch.

    The graph takes uint8 RGB [batch, h, w, 3] and returns class probabilities or scales: normalisation and softmax are
    inside it.

    Args:
        session: the network.
        config: its configuration.
    """

    def __init__(self, session: onnxruntime.InferenceSession, config: ScaleNetConfig) -> None:
        super().__init__(config)
        self._session = session
        self._input_name = session.get_inputs()[0].name

    def _run(self, tiles: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(None, {self._input_name: tiles})[0])


class OnnxScaleHead(FeaturePredictor):
    """A scale head exported to ONNX as `FeatureScalePredictor`, without torch.

    Args:
        session: the network.
        config: its configuration.
    """

    def __init__(self, session: onnxruntime.InferenceSession, config: HeadConfig) -> None:
        super().__init__(config)
        self._session = session
        self._input_names = [entry.name for entry in session.get_inputs()]

    def _run(self, levels: list[np.ndarray]) -> np.ndarray:
        return np.asarray(self._session.run(None, dict(zip(self._input_names, levels, strict=True)))[0])


def load_predictor(
    path: str | Path, device: str = "cpu", *, mixed_precision: bool = False
) -> OnnxScaleNet | OnnxScaleHead | ScaleNetPredictor | ScaleHeadPredictor:
    """Load a Scale Net or a scale head; its file says which it is.

    Args:
        path: weights, local or in a store: .onnx of `scalenet-ray export-onnx`, or .safetensors, which needs torch.
        device: where it computes, as torch names it.
        mixed_precision: run under bfloat16 autocast; for safetensors alone.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if the file is of neither, is damaged, is ONNX and mixed precision is asked for, or needs torch and
            that is not installed.
    """
    if not str(path).endswith(ONNX_SUFFIX):
        with needs_extra():
            from scalenet_ray.models.scale_head import load_torch_predictor
        return load_torch_predictor(path, device, mixed_precision=mixed_precision)
    if mixed_precision:
        msg = f"mixed precision is for weights as safetensors, got {path}, which has a precision of its own: give those"
        raise UserError(msg)
    session, kind, fields = open_network(str(path), SCALE_NET, SCALE_HEAD, device=device)
    if kind == SCALE_HEAD:
        return OnnxScaleHead(session, head_config(fields, str(path)))
    return OnnxScaleNet(session, net_config(fields, str(path)))
