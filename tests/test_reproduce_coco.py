"""The paper's experiment on COCO, with small random networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalenet_ray.core.errors import UserError
from scalenet_ray.experiments.coco import coco_policies, coco_table, expected_hours, tile_side
from scalenet_ray.models.class_names import COCO_CATEGORIES
from scalenet_ray.models.scale_net import build_scale_net, save_scale_net
from scalenet_ray.models.scale_networks import PRESETS
from scalenet_ray.models.torchvision_builders import build_detector
from scalenet_ray.models.torchvision_detectors import save_detector
from scalenet_ray.sample.scenes import SAMPLE_CATEGORIES, write_sample
from scalenet_ray.training.schedule import Training
from tests.job_scripts import load_job

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


def make_networks(folder: Path, categories: Any) -> tuple[str, str]:
    """Files of a small detector and a small Scale Net, with random weights."""
    torch.manual_seed(0)
    detector, scale_net = str(folder / "small.safetensors"), str(folder / "net.safetensors")
    save_detector(build_detector(SMALL, max(categories) + 1), SMALL, categories, detector)
    config = replace(PRESETS["unet-light"], input_side=64)
    save_scale_net(build_scale_net(config), config, scale_net)
    return detector, scale_net


def job_of(**settings: Any) -> Any:
    return load_job("reproduce_coco").ReproduceCoco(sides=(48, 60), **settings)


def run(job: Any) -> int:
    return load_job("reproduce_coco").main(job)


def test_it_evaluates_all_methods_at_both_sizes_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector, scale_net = make_networks(tmp_path, SAMPLE_CATEGORIES)
    data = write_sample(tmp_path / "sample", train=1, val=2)
    job = job_of(data=str(data), detectors=(detector,), scale_net=scale_net, output=str(tmp_path / "run"))
    assert run(job) == 0
    table = (tmp_path / "run" / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [(row[1], row[2]) for row in rows] == [
        (side, method)
        for side in ("48", "60")
        for method in (
            "detector alone",
            "Grid-Rescale",
            "Recursive-Scale Net",
            "Recursive-Scale Net, soft-NMS",
            "first pass, no network",
        )
    ]
    assert [row[9] for row in rows[:2]] == ["1.00", "5.00"]
    assert table in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "small" / "metrics.json").read_text())
    assert metrics["images"] == {"total": 2, "done": 2, "failed": 0}
    policies = yaml.safe_load((tmp_path / "run" / "small.policies.yaml").read_text())
    assert [policy["input_side"] for policy in policies] == [64] * 5 + [80] * 5
    assert run(replace(job, resume=True)) == 0
    assert (tmp_path / "run" / "table.md").read_text().count("\n") == table.count("\n")


@pytest.mark.ray
@pytest.mark.slow
def test_it_trains_scale_net_where_none_is_given(idle_ray: None, tmp_path: Path) -> None:
    detector, _ = make_networks(tmp_path, SAMPLE_CATEGORIES)
    data = write_sample(tmp_path / "sample", train=8, val=1)
    job = job_of(
        data=str(data),
        detectors=(detector,),
        preset="unet-light",
        training=Training(epochs=1, batch_size=4),
        output=str(tmp_path / "run"),
    )
    job = replace(job, sides=(60,))
    assert run(job) == 0
    weights = tmp_path / "run" / "scale_net" / "scale_net.safetensors"
    written = weights.stat().st_mtime_ns
    assert run(replace(job, resume=True)) == 0
    assert weights.stat().st_mtime_ns == written
    config = yaml.safe_load((tmp_path / "run" / "scale_net" / "config.yaml").read_text())
    assert config["settings"]["tile_side"] == 80
    assert config["settings"]["split"] == "train2017"


@pytest.mark.slow
def test_it_runs_on_photographs_with_two_detectors(real_data: Path, tmp_path: Path) -> None:
    detector, scale_net = make_networks(tmp_path, COCO_CATEGORIES)
    job = job_of(
        data=str(real_data / "coco"),
        detectors=(detector, f"{SMALL}@{detector}"),
        scale_net=scale_net,
        limit=3,
        output=str(tmp_path / "run"),
    )
    assert run(job) == 0
    rows = (tmp_path / "run" / "table.md").read_text().splitlines()[2:]
    assert len(rows) == 20
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} == {"small", SMALL}


def test_detectors_of_one_name_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--detectors must be one or more of different names, got net, net"):
        run(job_of(data=str(tmp_path), detectors=("a/net.safetensors", "b/net.pth")))


# --- policies and table -----------------------------------------------------------------------------


def test_the_papers_settings_are_those_of_its_section_on_coco() -> None:
    by_name = {policy.name: policy for policy in coco_policies((800,), iou_threshold=0.5, score_threshold=0.05)}
    rules = by_name["paper@800"].recursion
    assert (rules.method, rules.threshold, rules.small_classes) == ("confidence", 0.3, (1,))
    assert (rules.window, rules.zoom, rules.max_depth, rules.keep_factor) == (0.5, 2.0, 2, 8.0)
    assert by_name["grid-2@800"].grid == 2
    assert by_name["paper-soft@800"].merging.method == "soft-nms-linear"
    assert {policy.merging.score_threshold for policy in by_name.values()} == {0.05}
    assert {policy.input_side for policy in by_name.values()} == {1067}


def test_the_longer_side_belongs_to_a_photograph_of_four_by_three() -> None:
    assert [tile_side(side) for side in (480, 600, 800)] == [640, 800, 1067]


def test_the_cost_grows_with_images_detectors_and_pixels() -> None:
    hours = expected_hours(5000, (800,), 1)
    assert hours == pytest.approx(5000 * 13.9 / 6.9 / 3600)
    assert expected_hours(2500, (800,), 2) == pytest.approx(hours)
    assert expected_hours(5000, (400,), 1) == pytest.approx(hours / 4)


def test_the_table_has_the_papers_ratio_where_it_is_known_and_gaps_where_nothing_is() -> None:
    policies = {
        "whole@800": {"AP": 30.0, "AP_small": float("nan"), "images_per_second": 10.0},
        "paper@800": {"AP": 31.0, "images_per_second": 4.0},
        "first-pass@800": {"AP": 31.5, "images_per_second": None},
    }
    _, _, whole, scale_net, first_pass = coco_table({"net": policies}).splitlines()
    assert whole == "| net | 800 | detector alone | 30.00 |  |  |  |  |  |  | 10.00 | 1.00 | 1.00 |"
    assert scale_net.endswith("| 4.00 | 0.40 | 0.36 |")
    assert first_pass.endswith("|  |  |  |")
