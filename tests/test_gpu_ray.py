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
from tests.devices import DEVICES, ON_GPU
from tests.job_scripts import load_job, same_results
from tests.training_fakes import SmallRecipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(
    ("policy", "device", "images"),
    [
        ("scalenet", "cpu", 4),
        pytest.param("scalenet", "cuda", 100, marks=ON_GPU),
        pytest.param("first-pass", "cuda", 100, marks=ON_GPU),
    ],
)
def test_two_actors_that_share_a_gpu_find_what_one_process_finds_on_the_cpu(
    idle_ray: None, policy: str, device: str, images: int, tmp_path: Path
) -> None:
    module = load_job("eval_coco")
    write_sample(tmp_path / "sample", train=1, val=images)
    share = 0.5 if device == "cuda" else 0.0
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
        networks=replace(local.networks, device=device),
        resources=ResourceChoice(gpus_per_scale_actor=share, gpus_per_detector_actor=share, detector_batch_size=8),
    )
    for job in (local, shared):
        assert module.main(job) == 0

    def read(name: str, file: str) -> Any:
        return json.loads((tmp_path / name / file).read_text())

    ap = {name: read(name, "metrics.json")["policies"][policy]["AP"] for name in ("local", "shared")}
    assert ap["local"] > 5
    # TF32 on a GPU moves scores by a thousandth, and with them what is suppressed.
    assert ap["shared"] == pytest.approx(ap["local"], abs=0.5)
    assert device == "cuda" or same_results(read("local", "results.json"), read("shared", "results.json"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_worker_on_a_gpu_trains_the_same_weights(idle_ray: None, device: str, tmp_path: Path) -> None:
    settings = Training(batch_size=4, epochs=1, keep=1)
    weights = {}
    for name, gpus in (("cpu", 0.0), (device, 1.0 if device == "cuda" else 0.0)):
        rows: list[dict[str, Any]] = []
        folder = tmp_path / f"{len(weights)}-{name}"
        train(SmallRecipe(), replace(settings, gpus_per_worker=gpus), str(folder), rows.append)
        assert [row["epoch"] for row in rows] == [1]
        weights[folder] = load_file(folder / SmallRecipe.file_name)
    expected, found = weights.values()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)
