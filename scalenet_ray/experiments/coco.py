"""The paper's experiment on COCO (Tables 5 and 6): its methods as policies, their cost, and the table of the results.

Of the paper's own figures only the speeds are known here; its AP stands in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scalenet_ray.core.policy import Policy, parse_policy

PAPER_FPS = {"whole": 6.9, "paper": 2.5}
"""Images/s of the paper's detector alone, and with Recursive-Scale Net."""

_METHODS = {
    "whole": "detector alone",
    "grid-2": "Grid-Rescale",
    "paper": "Recursive-Scale Net",
    "paper-soft": "Recursive-Scale Net, soft-NMS",
    "first-pass": "first pass, no network",
}
"""Policy -> row of the table."""

_PASSES = {"whole": 1.0, "grid-2": 5.0, "paper": 2.8, "paper-soft": 2.8, "first-pass": 2.3}
"""Detector passes per image, as measured with another detector on photographs (docs/results.md)."""

_COLUMNS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_TITLES = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


def tile_side(side: int) -> int:
    """Longer side of a whole photograph's tile, in pixels, for the shorter side that detectors are named by.

    Photographs of COCO are mostly 4 : 3.
    """
    return round(side * 4 / 3)


def coco_policies(sides: Sequence[int], *, iou_threshold: float, score_threshold: float) -> list[Policy]:
    """Policies of the paper's methods, and of the first pass, at each size; named METHOD@SIDE.

    Args:
        sides: shorter sides of a whole photograph's tile in pixels; the paper's are 600 and 800.
        iou_threshold: the detector's NMS threshold.
        score_threshold: minimum score of a detection.
    """
    policies = []
    for side in sides:
        for method in _METHODS:
            policy = parse_policy(
                method.removesuffix("-soft"),
                input_side=tile_side(side),
                iou_threshold=iou_threshold,
                score_threshold=score_threshold,
            )
            if method != "first-pass":
                suppression = "soft-nms-linear" if method.endswith("-soft") else "nms"
                policy = replace(policy, merging=replace(policy.merging, method=suppression))
            policies.append(replace(policy, name=f"{method}@{side}"))
    return policies


def expected_hours(images: int, sides: Sequence[int], detectors: int) -> float:
    """Hours of the whole experiment on one GPU as fast as the paper's: a pass at 800 takes 1 / 6.9 s."""
    passes = sum(_PASSES.values()) * sum((side / 800) ** 2 for side in sides)
    return images * detectors * passes / PAPER_FPS["whole"] / 3600


def coco_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a Markdown table, a row for each method, size and detector.

    Args:
        metrics: detector -> policy, named as by `coco_policies` -> its row of metrics.json.
    """
    titles = ("detector", "side", "method", *_TITLES, "passes", "FPS", "FPS over alone", "the paper's")
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for detector, policies in metrics.items():
        for name, row in policies.items():
            method, _, side = name.rpartition("@")
            alone = policies[f"whole@{side}"]
            figures = [
                *(row.get(key) for key in _COLUMNS),
                _ratio(row, alone, "detector_passes_per_image"),
                row.get("images_per_second"),
                _ratio(row, alone, "images_per_second"),
                PAPER_FPS[method] / PAPER_FPS["whole"] if method in PAPER_FPS else None,
            ]
            lines.append(f"| {' | '.join([detector, side, _METHODS[method], *map(_cell, figures)])} |")
    return "\n".join(lines)


def _ratio(row: Mapping[str, Any], other: Mapping[str, Any], key: str) -> float | None:
    return row[key] / other[key] if row.get(key) and other.get(key) else None


def _cell(value: float | None) -> str:
    """A figure with two decimals, or "" for None and NaN."""
    return "" if value is None or value != value else f"{value:.2f}"
