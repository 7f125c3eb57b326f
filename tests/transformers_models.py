"""Tiny detectors of transformers with random weights, built from configurations without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIDE = 96
"""Side of the tiles that the image processors make."""

NAMES = {0: "cat", 1: "dog", 2: "kite"}

_DETR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
    "backbone": None,
    "use_timm_backbone": False,
}
_RT_DETR = {
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "num_queries": 30,
    "encoder_in_channels": [16, 24, 32],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_denoising": 0,
    "backbone": None,
}
_LEVELS = ["stage2", "stage3", "stage4"]
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_TWO_STAGES = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 20}


def _resnet(levels: list[str]) -> Any:
    return transformers.ResNetConfig(**_RESNET, out_features=levels)


def _hgnet() -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=_LEVELS,
    )


def _config(kind: str, **settings: Any) -> Any:
    """Configuration of a kind of `KINDS`."""
    names = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    if kind in ("rt_detr", "rt_detr_v2"):
        make = transformers.RTDetrConfig if kind == "rt_detr" else transformers.RTDetrV2Config
        backbone = transformers.RTDetrResNetConfig(**_RESNET, out_features=_LEVELS)
        return make(backbone_config=backbone, **{**_RT_DETR, **names, **settings})
    if kind == "d_fine":
        channels = {"encoder_in_channels": [24, 32, 32]}
        return transformers.DFineConfig(backbone_config=_hgnet(), **{**_RT_DETR, **channels, **names, **settings})
    if kind == "yolos":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return transformers.YolosConfig(
            **{**sizes, "image_size": [64, 96], "num_detection_tokens": 20, **names, **settings}
        )
    make = {
        "detr": transformers.DetrConfig,
        "table-transformer": transformers.TableTransformerConfig,
        "conditional_detr": transformers.ConditionalDetrConfig,
    }.get(kind, transformers.DeformableDetrConfig)
    levels = _LEVELS if kind.startswith("deformable") else _LEVELS[-1:]
    stages = _TWO_STAGES if kind == "deformable_detr, two stages" else {}
    return make(backbone_config=_resnet(levels), **{**_DETR, **stages, **names, **settings})


KINDS = (
    "conditional_detr",
    "d_fine",
    "deformable_detr",
    "deformable_detr, two stages",
    "detr",
    "rt_detr",
    "rt_detr_v2",
    "table-transformer",
    "yolos",
)


def build(kind: str, **settings: Any) -> Any:
    """A model of a kind, the same each time, whose answers depend on what it sees; evaluation mode.

    Fresh networks answer all pictures alike: their weights are of a hundredth, and some of their tokens are zero.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_config(_config(kind, **settings))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            # Boxes stay near the middle of the picture.
            torch.nn.init.xavier_normal_(module.weight, gain=0.3 if module.weight.shape[0] == 4 else 2.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("detection_tokens", "position_embeddings")):
            torch.nn.init.normal_(parameter)
    return model.eval()


def processor_of(kind: str) -> Any:
    """The image processor of a kind, with `SIDE`."""
    both, shorter = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
        return transformers.RTDetrImageProcessor(size=both)
    make = {
        "yolos": transformers.YolosImageProcessor,
        "detr": transformers.DetrImageProcessor,
        "table-transformer": transformers.DetrImageProcessor,
        "deformable_detr": transformers.DeformableDetrImageProcessor,
        "deformable_detr, two stages": transformers.DeformableDetrImageProcessor,
    }.get(kind, transformers.ConditionalDetrImageProcessor)
    return make(size=shorter)


def save(folder: Path, kind: str, **settings: Any) -> str:
    """Write a model and its image processor as `save_pretrained` does; returns the folder."""
    build(kind, **settings).save_pretrained(folder)
    processor_of(kind).save_pretrained(folder)
    return str(folder)
