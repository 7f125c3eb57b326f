"""Steps that commands and the Python interface share: prepare inputs, evaluate or detect, write the report."""

from __future__ import annotations

from scalenet_ray.workflows.detection import DetectionRun
from scalenet_ray.workflows.evaluation import evaluate_policies
from scalenet_ray.workflows.image_sets import (
    CocoSplit,
    ImageSet,
    check_split,
    open_images,
    open_split,
    sample_inputs,
    with_categories,
    with_ground_truth,
)
from scalenet_ray.workflows.preparation import (
    EngineName,
    choose_policies,
    file_policies,
    named_policies,
    prepare_run,
    settle_workers,
    start_session,
)
from scalenet_ray.workflows.run_report import PICTURES, ProgressLog, write_report, write_summary

__all__ = [
    "PICTURES",
    "CocoSplit",
    "DetectionRun",
    "EngineName",
    "ImageSet",
    "ProgressLog",
    "check_split",
    "choose_policies",
    "evaluate_policies",
    "file_policies",
    "named_policies",
    "open_images",
    "open_split",
    "prepare_run",
    "sample_inputs",
    "settle_workers",
    "start_session",
    "with_categories",
    "with_ground_truth",
    "write_report",
    "write_summary",
]
