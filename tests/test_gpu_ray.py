"""The engine and Ray Train on a GPU: actors share it by fractions, and a worker trains on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalenet_ray.engine.train import train
from scalenet_ray.models.spec import SAMPLE_DETECTOR_WEIGHTS, SAMPLE_SCALE_NET_WEIGHTS, NetworkSpec
from scalenet_ray.runs.resources import ResourceChoice
from scalenet_ray.sample.scenes import write_sample
from scalenet_ray.training.schedule import Training
from tests.devices import ON_GPU
from tests.job_scripts import load_job
from tests.training_fakes import SmallRecipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, *ON_GPU]


@pytest.mark.parametrize("policy", ["scalenet", "first-pass"])
def test_two_actors_that_share_a_gpu_find_what_one_process_finds_on_the_cpu(
    idle_ray: None, policy: str, tmp_path: Path
) -> None:
    module = load_job("eval_coco")
    write_sample(tmp_path / "sample", train=1, val=100)
    local = module.EvalCoco(
        data=str(tmp_path / "sample"),
        output=str(tmp_path / "local"),
        policies=(policy,),
        engine="local",
        networks=NetworkSpec(detector=SAMPLE_DETECTOR_WEIGHTS, scale_net=SAMPLE_SCALE_NET_WEIGHTS),
        report_pictures=0,
    )
    shared = replace(
        local,
        output=str(tmp_path / "shared"),
        engine="ray",
        networks=replace(local.networks, device="cuda"),
        resources=ResourceChoice(gpus_per_scale_actor=0.5, gpus_per_detector_actor=0.5, detector_batch_size=8),
    )
    for job in (local, shared):
        assert module.main(job) == 0
    ap = {
        name: json.loads((tmp_path / name / "metrics.json").read_text())["policies"][policy]["AP"]
        for name in ("local", "shared")
    }
    assert ap["local"] > 5
    # TF32 on a GPU moves scores by a thousandth, and with them what is suppressed.
    assert ap["shared"] == pytest.approx(ap["local"], abs=0.5)


def test_a_worker_on_a_gpu_trains_the_same_weights(idle_ray: None, tmp_path: Path) -> None:
    weights = []
    for gpus in (0.0, 1.0):
        rows: list[dict[str, Any]] = []
        folder = tmp_path / str(gpus)
        train(SmallRecipe(), Training(batch_size=4, epochs=1, keep=1, gpus_per_worker=gpus), str(folder), rows.append)
        assert [row["epoch"] for row in rows] == [1]
        weights.append(load_file(folder / SmallRecipe.file_name))
    expected, found = weights
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)
